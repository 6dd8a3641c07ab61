"""Every quantity stays within its stated bound on every stress problem, in every backend and storage type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers import BACKENDS, DOUBLE, needs_triton, same_bits, threads
from helpers_attention import Problem, solve
from helpers_loss import make_loss_problem, solve_loss
from torch import Tensor

from attbalance_ext import AttBalanceConfig, QueryAttention
from tests.numerics import measure, stress
from tests.numerics.bounds import ATTENTION, attention_bounds

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
STORAGE = {"reference": (F32, BF16, F16, F64), "cpu": (F32, BF16, F16, F64), "cuda": (F32, BF16, F16)}
# Triton's interpreter is slow: low precision where it decides what happens.
LOW = ("A_in from 1e-30 to 1 - 1e-8", "largest keys", "subnormal keys", "subnormal gradients")
INTERPRETED = [("triton", F32, name) for name in stress.ATTENTION] + [
    ("triton", dtype, name) for dtype in (BF16, F16) for name in LOW
]
EVERY = (*BACKENDS, "triton")


def marked(case: tuple[object, ...]) -> object:
    return pytest.param(*case, marks=needs_triton) if case[0] == "triton" else case


@pytest.mark.parametrize(
    ("backend", "dtype", "name"),
    [
        *((backend, dtype, name) for backend in BACKENDS for dtype in STORAGE[backend] for name in stress.ATTENTION),
        *map(marked, INTERPRETED),
    ],
    ids=str,
)
def test_attention_terms(backend: str, dtype: torch.dtype, name: str) -> None:
    shares = measure.attention_shares(name, dtype, backend)
    assert set(shares) == set(ATTENTION) - ({"dot"} if backend == "reference" else set())
    assert all(share <= 1 for share in shares.values()), shares


@pytest.mark.parametrize(
    ("backend", "name"), [marked((backend, name)) for backend in EVERY for name in stress.LOSS], ids=str
)
def test_balanced_loss(backend: str, name: str) -> None:
    shares = measure.loss_shares(name, backend)
    assert all(share <= 1 for share in shares.values()), shares


# --- the bounds are not so wide that anything passes -----------------------------------------------------------------


def in_float32(name: str) -> tuple[Problem, measure.Found, measure.Found]:
    problem, truth = measure.attention_problem(name, F32)
    return problem, measure.attention_truth(truth), attention_bounds(problem, truth, "cpu")


def test_the_textbook_s_rac_breaks_its_bound() -> None:
    """-2 log A_in in float32, which keeps nothing of RAC as A_in tends to 1."""
    _, truth, allowed = in_float32("A_in from 1e-30 to 1 - 1e-8")
    rac = -2 * truth["in_box"].float().log()
    assert measure.shares({"rac": rac}, truth, allowed, ["rac"])["rac"] > 100


def test_the_textbook_s_kl_breaks_its_bound() -> None:
    """sum t (log t - log p) in float32, of a teacher that almost agrees."""
    problem, truth, allowed = in_float32("teacher almost agrees")

    def log_softmax(attention: QueryAttention) -> Tensor:
        return (attention.scale[0] * attention.key[0] @ attention.query[0][..., None])[..., 0].log_softmax(-1)

    log_p, log_t = log_softmax(problem.student()), log_softmax(problem.teacher)
    mrc = (log_t.exp() * (log_t - log_p)).sum(-1)[None]
    assert measure.shares({"mrc": mrc}, truth, allowed, ["mrc"])["mrc"] > 10


@pytest.mark.parametrize("quantity", ["in_box", "dot", "key", "query"])
def test_scores_in_half_precision_break_the_bounds(quantity: str) -> None:
    problem, truth, allowed = in_float32("random, large scores")
    rounded = replace(problem, key=[k.bfloat16().float() for k in problem.key])
    found = measure.shares(measure.attention_results(rounded, "cpu"), truth, allowed, [quantity])
    assert found[quantity] > 10


# --- same bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", stress.ATTENTION)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_terms_repeat(backend: str, name: str) -> None:
    problem, _ = measure.attention_problem(name, F32)
    first, second = (solve(problem, backend).tensors() for _ in range(2))
    assert all(map(same_bits, first, second))


@pytest.fixture(params=[False, True], ids=["subnormals kept", "subnormals flushed"])
def flushing(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether this thread flushes subnormal numbers to 0. The pool's other threads were there before and do not."""
    with threads(8):
        torch.ones(1 << 20).exp_()
    with flushed() if request.param else threads(1):
        yield request.param


class flushed:  # noqa: N801 - used like a function
    """Subnormal numbers count as 0 and become 0 in this thread."""

    def __enter__(self) -> None:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor has no such mode")

    def __exit__(self, *_: object) -> None:
        torch.set_flush_denormal(False)


DOWN = range(8, 0, -1)  # growing again, the pool would get threads that know the setting


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", stress.ATTENTION)
def test_threads_of_attention_terms(name: str, dtype: torch.dtype, flushing: bool) -> None:
    problem, _ = measure.attention_problem(name, dtype)
    found = []
    for count in DOWN:
        with threads(count):
            found.append(solve(problem, "cpu").tensors())
    assert all(all(map(same_bits, found[0], other)) for other in found[1:])


@pytest.mark.parametrize("name", [*stress.LOSS, "5000 samples"])
def test_threads_of_balanced_loss(name: str, flushing: bool) -> None:
    if name == "5000 samples":  # enough for a thread of its own for each layer
        problem, config = make_loss_problem(layers=8, batch=5000, ties=True), AttBalanceConfig()
        problem.in_box[::2] *= 1e-38
    else:
        problem, config = measure.loss_problem(name)
    found = []
    for count in DOWN:
        with threads(count):
            found.append(solve_loss(problem, config, "cpu").tensors())
    assert all(all(map(same_bits, found[0], other)) for other in found[1:])


# --- flushed to zero -------------------------------------------------------------------------------------------------

SUBNORMAL_INPUTS = ("subnormal keys", "subnormal weights")


@pytest.mark.parametrize("name", [name for name in stress.ATTENTION if name not in SUBNORMAL_INPUTS])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("backend", DOUBLE)
def test_flushed_to_zero(backend: str, dtype: torch.dtype, name: str) -> None:
    """The bounds hold with the smallest normal number in the place of the smallest one."""
    measure.attention_problem(name, dtype)  # its truth, made as always
    with flushed():
        shares = measure.attention_shares(name, dtype, backend, flushed=True)
    assert all(share <= 1 for share in shares.values()), shares


@pytest.mark.parametrize("backend", DOUBLE)
@pytest.mark.parametrize("name", SUBNORMAL_INPUTS)
def test_flushed_subnormal_inputs_are_zeros(backend: str, name: str) -> None:
    problem, _ = measure.attention_problem(name, F32)

    def zeroed(values: Tensor) -> Tensor:
        return torch.where(values.abs() < torch.finfo(F32).tiny, 0, values)

    teacher = replace(problem.teacher, key=[zeroed(k) for k in problem.teacher.key])
    zeros = replace(problem, key=[zeroed(k) for k in problem.key], region=zeroed(problem.region), teacher=teacher)
    changed = zip([*problem.key, problem.region], [*zeros.key, zeros.region], strict=True)
    assert not all(torch.equal(a, b) for a, b in changed)
    with flushed():
        found, expected = (solve(p, backend).tensors() for p in (problem, zeros))
    assert all(map(same_bits, found, expected))


# --- overflow --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [marked((backend,)) if backend == "triton" else backend for backend in EVERY])
def test_gradients_beyond_the_storage_type_are_infinite(backend: str) -> None:
    """As a GradScaler has to see it: neither NaN nor the largest number, and in this sample alone."""
    problem, truth = measure.attention_problem("random, small scores", F16)
    small = solve(problem, backend)
    largest = max(gradient[1].abs().max().item() for gradient in truth.grad_key)
    factor = torch.tensor([1.0, 4 * 65504 / largest])
    large = solve(replace(problem, incoming=tuple(g * factor for g in problem.incoming)), backend)
    for a, b, exact in zip(large.grad_key, small.grad_key, truth.grad_key, strict=True):
        assert same_bits(a[0], b[0])
        wanted = factor[1].item() * exact[1]
        beyond = wanted.abs() > 66000  # 65504 is the largest, and rounding has its say up to 65520
        assert beyond.any()
        assert not beyond.all()
        assert torch.equal(a[1][beyond].double(), wanted[beyond].sign() * torch.inf)
        assert a[1][wanted.abs() < 65000].isfinite().all()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("backend", [marked((backend,)) if backend == "triton" else backend for backend in EVERY])
def test_a_key_that_overflowed_makes_its_row_nan(backend: str, dtype: torch.dtype) -> None:
    problem, _ = measure.attention_problem("random, small scores", dtype)
    clean = solve(problem, backend)
    key = [k.clone() for k in problem.key]
    key[1][0, 5] = torch.finfo(dtype).max * 2
    assert key[1][0, 5].isinf().all()
    found = solve(replace(problem, key=key), backend)
    for after, before in zip(found.terms[:3], clean.terms[:3], strict=True):
        assert after[1, 0].isnan()
        assert same_bits(after[0], before[0])
        assert same_bits(after[1, 1], before[1, 1])
    assert found.grad_key[1][0].isnan().all()
    assert same_bits(found.grad_key[1][1], clean.grad_key[1][1])
