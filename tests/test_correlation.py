"""`spearman_rho` against SciPy."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attbalance_ext import spearman_rho


def scipy_rho(x: Tensor, y: Tensor, valid: Tensor | None = None) -> Tensor:
    """Row by row, over the samples that are valid and finite; 0 where SciPy says NaN."""
    found = []
    for row in x.double().numpy():
        kept = np.isfinite(row) & np.isfinite(y.double().numpy())
        if valid is not None:
            kept &= valid.numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rho = scipy.stats.spearmanr(row[kept], y.double().numpy()[kept]).statistic if kept.sum() > 1 else np.nan
        found.append(0.0 if np.isnan(rho) else rho)
    return torch.tensor(found, dtype=x.dtype)


few_values = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, -1.0, float("nan"), float("inf"), -float("inf")])
values = st.one_of(few_values, st.floats(-1, 1, width=32))


@given(samples=st.lists(st.tuples(values, values, values, st.booleans()), min_size=0, max_size=40))
def test_against_scipy(samples: list[tuple[float, float, float, bool]]) -> None:
    """Ties, invalid samples and values that are not finite in any mixture."""
    columns = torch.tensor([sample[:3] for sample in samples]).reshape(-1, 3).T.contiguous()
    valid = torch.tensor([sample[3] for sample in samples], dtype=torch.bool)
    x, y = columns[:2], columns[2]
    torch.testing.assert_close(spearman_rho(x, y), scipy_rho(x, y), rtol=0, atol=1e-6)
    torch.testing.assert_close(spearman_rho(x, y, valid), scipy_rho(x, y, valid), rtol=0, atol=1e-6)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("batch", [2, 3, 64, 5000])
def test_float64_to_rounding(batch: int, ties: bool) -> None:
    x, y = torch.rand(3, batch, dtype=torch.float64), torch.rand(batch, dtype=torch.float64)
    if ties:
        x, y = (x * 8).round(), (y * 8).round()
    found = spearman_rho(x, y)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, scipy_rho(x, y), rtol=0, atol=1e-12)


UNDEFINED = {
    "no samples": (torch.zeros(2, 0), torch.zeros(0)),
    "one sample": (torch.ones(2, 1), torch.ones(1)),
    "constant x": (torch.ones(2, 5), torch.rand(5)),
    "constant y": (torch.rand(2, 5), torch.ones(5)),
    "nothing finite": (torch.full((2, 5), float("nan")), torch.rand(5)),
}


@pytest.mark.parametrize(("x", "y"), UNDEFINED.values(), ids=UNDEFINED)
def test_0_where_undefined(x: Tensor, y: Tensor) -> None:
    assert spearman_rho(x, y).tolist() == [0, 0]


def test_ends_of_the_scale() -> None:
    x = torch.rand(20).sort().values
    assert spearman_rho(torch.stack([x, -x, x.exp()]), x).tolist() == [1, -1, 1]


def test_each_layer_leaves_out_its_own_samples() -> None:
    x, y = torch.rand(2, 10), torch.rand(10)
    x[0, 3] = float("nan")
    found = spearman_rho(x, y)
    kept = torch.arange(10) != 3
    torch.testing.assert_close(found[:1], scipy_rho(x[:1, kept], y[kept]))
    torch.testing.assert_close(found[1:], scipy_rho(x[1:], y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_ranked_as_it_is(dtype: torch.dtype) -> None:
    x, y = torch.rand(2, 50).to(dtype), torch.rand(50)
    found = spearman_rho(x, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, scipy_rho(x.float(), y), rtol=0, atol=1e-6)


def test_no_gradient_and_no_write() -> None:
    x, y = torch.rand(2, 9, requires_grad=True), torch.rand(9, requires_grad=True)
    before = x.detach().clone(), y.detach().clone()
    assert not spearman_rho(x, y).requires_grad
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


X, Y = torch.rand(2, 5), torch.rand(5)
WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "x of integers": (lambda: spearman_rho(X.long(), Y), TypeError, "x must.*int64"),
    "y of integers": (lambda: spearman_rho(X, Y.long()), TypeError, "y must.*int64"),
    "y is a list": (lambda: spearman_rho(X, [0.0] * 5), TypeError, "y must.*list"),
    "x of rank 1": (lambda: spearman_rho(Y, Y), ValueError, r"x must.*\(L, B\).*\(5,\)"),
    "y too long": (lambda: spearman_rho(X, torch.rand(6)), ValueError, r"y must.*\(5,\).*\(6,\)"),
    "y elsewhere": (lambda: spearman_rho(X, Y.to("meta")), ValueError, "y must.*cpu.*meta"),
    "valid of floats": (lambda: spearman_rho(X, Y, Y), TypeError, "valid.*bool.*float32"),
    "valid too short": (
        lambda: spearman_rho(X, Y, torch.ones(4, dtype=torch.bool)),
        ValueError,
        r"valid.*\(5,\).*\(4,\)",
    ),
    "valid elsewhere": (
        lambda: spearman_rho(X, Y, torch.ones(5, dtype=torch.bool, device="meta")),
        ValueError,
        "valid.*cpu.*meta",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_arguments_it_refuses(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
