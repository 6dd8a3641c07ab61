"""`attention_terms` on a CUDA device against the literal equations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import same_bits
from helpers_attention import (
    GRIDS,
    LAYOUTS,
    assert_solves,
    literal,
    make_problem,
    multiplied_out,
    offset_gradients,
    problem_of,
    solve,
)
from helpers_exact import exact, extreme_problem
from helpers_gpu import BACKENDS, DEVICE, at_home, on_device, poison
from helpers_pairwise import case_id, pairwise

from attbalance_ext import BackendUnavailable, BoxRegion, QueryAttention, attention_terms
from attbalance_ext.kernels.choose import choose

pytestmark = pytest.mark.gpu

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# query by layer, key by layer, teacher
DTYPES = {
    "f32": ((F32,), (F32,), F32),
    "bf16": ((BF16,), (BF16,), BF16),
    "f16": ((F16,), (F16,), F16),
    "f32_bf16": ((F32,), (BF16,), BF16),
    "by_layer": ((F32, BF16, F16), (BF16, F32, F32, F16), F32),
    "teacher_bf16": ((F32,), (F32,), BF16),
}
FACTORS: dict[str, list[Any]] = {
    "dtypes": list(DTYPES),
    "tokens": list(GRIDS),
    "batch": [0, 1, 3, 8, 64],
    "layers": [1, 4, 6],
    "width": [1, 7, 32, 250, 256, 512, 768, 1024, 1032],
    "layout": list(LAYOUTS),
    "region": ["touch", "center", "coverage", "nearest", "weights", "bool"],
    "padded": [False, True],
    "distance": [None, 1.0, 1e-2],
    "spread": [1e-2, 1.0, 8.0],
}
# Nearly every case has Triton compile its kernels, for some seconds.
FEWER: dict[str, list[Any]] = {
    "dtypes": ["f32", "bf16", "by_layer", "teacher_bf16"],
    "tokens": [1, 400, 500],
    "width": [7, 256, 1032],
    "region": ["touch", "coverage", "weights", "bool"],
}


def small_enough(case: dict[str, Any]) -> bool:
    """The truth is worked out on the CPU, sample by sample."""
    return case["batch"] * case["layers"] * case["tokens"] * case["width"] <= 5_000_000


CASES = [
    *(("cuda", case) for case in pairwise(FACTORS, small_enough)),
    *(("triton", case) for case in pairwise(FACTORS | FEWER, small_enough)),
]


@pytest.mark.parametrize(("backend", "case"), CASES, ids=lambda part: part if isinstance(part, str) else case_id(part))
def test_against_the_equations(backend: str, case: dict[str, Any]) -> None:
    problem = problem_of(case, DTYPES[case["dtypes"]])
    there = on_device(problem)
    poison()
    solution = solve(there, backend)
    assert_solves(at_home(solution), literal(problem))
    again = solve(there, backend)
    assert all(map(same_bits, solution.tensors(), again.tensors()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_factors_of_the_keys_gradient(dtype: torch.dtype, backend: str) -> None:
    problem = make_problem(tokens=400, width=256, key_dtype=(dtype,), teacher_dtype=dtype, padded=True)
    there = on_device(problem)
    poison()
    factors, grad_key, _ = offset_gradients(there, backend, [True, True])
    assert grad_key == [None, None]
    solution = solve(there, backend)
    multiplied = [multiplied_out(*three) for three in zip(factors, there.query, there.key, strict=True)]
    assert all(map(torch.equal, multiplied, solution.grad_key))
    assert_solves(at_home(replace(solution, grad_key=multiplied)), literal(problem))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", [1.0, 1e-6, float("inf")])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_both_ends_against_60_digits(dtype: torch.dtype, distance: float, backend: str) -> None:
    """A_in near 0 and 1, with the device's own exp and log."""
    in_box = [1e-30, 1e-12, 1e-4, 0.3, 0.499, 0.501, 0.9, 1 - 1e-4, 1 - 1e-8]
    problem = extreme_problem(in_box, distance, dtype, width=64)
    assert_solves(at_home(solve(on_device(problem), backend)), exact(problem))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("offset", [1, 3, 8])
def test_pointers_that_are_not_aligned(dtype: torch.dtype, offset: int, backend: str) -> None:
    problem = make_problem(tokens=400, width=256, key_dtype=(dtype,), teacher_dtype=dtype)
    truth = literal(problem)
    there = on_device(problem)

    def shifted(key: torch.Tensor) -> torch.Tensor:
        return torch.empty(key.numel() + offset, dtype=key.dtype, device=DEVICE)[offset:].view(key.shape).copy_(key)

    there.key = [shifted(key) for key in there.key]
    assert any(key.data_ptr() % 16 for key in there.key) or offset == 8
    assert_solves(at_home(solve(there, backend)), truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_shape(backend: str) -> None:
    """L=6, B=64, N=400, D=256 in bf16: too much for the literal truth, so the reference in float64 on the device."""
    problem = on_device(make_problem(layers=6, batch=64, tokens=400, width=256, key_dtype=(BF16,), teacher_dtype=BF16))
    wide = problem.to(torch.float64)
    wide.incoming = tuple(gradient.double() for gradient in problem.incoming)
    solution, truth = solve(problem, backend), solve(wide, "reference")
    for name, actual, expected in (
        *zip(("in_box", "rac", "mrc"), solution.terms[:3], truth.terms[:3], strict=True),
        *(("query", *pair) for pair in zip(solution.grad_query, truth.grad_query, strict=True)),
        *(("key", *pair) for pair in zip(solution.grad_key, truth.grad_key, strict=True)),
    ):
        error = (actual.double() - expected).norm() / expected.norm()
        assert error <= (3e-2 if name == "key" else 2e-5), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_two_billion_elements(backend: str) -> None:
    """Offsets are 64 bits wide: the last sample of a key of 2^31 elements and more is read and its gradient written."""
    batch, tokens, width = 6000, 1400, 256
    if torch.cuda.get_device_properties(DEVICE).total_memory < 20 << 30:
        pytest.skip("needs 20 GB of GPU memory")
    assert batch * tokens * width > 2**31
    key = torch.empty(batch, tokens, width, dtype=BF16, device=DEVICE).normal_().requires_grad_()
    query = torch.randn(batch, width, device=DEVICE)
    region = torch.rand(batch, tokens, device=DEVICE)
    terms = attention_terms(QueryAttention(query, key, 0.05), region, backend=backend)
    (gradient,) = torch.autograd.grad(terms.rac.sum(), key)
    for sample in (0, batch // 2, batch - 1):
        one = slice(sample, sample + 1)
        lone = key.detach()[one].double().requires_grad_()
        truth = attention_terms(
            QueryAttention(query[one].double(), lone, 0.05), region[one].double(), backend="reference"
        )
        (expected,) = torch.autograd.grad(truth.rac.sum(), lone)
        assert (terms.rac[:, one] - truth.rac).abs().max() <= 2e-5 * truth.rac.abs().max()
        assert (gradient[one].double() - expected).norm() <= 4e-3 * expected.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_left_to_the_reference(backend: str) -> None:
    problem = on_device(make_problem(query_dtype=(torch.float64,), key_dtype=(torch.float64,)))
    with pytest.raises(BackendUnavailable, match="float64"):
        solve(problem, backend)
    assert choose("auto", "cuda", torch.float64) == "reference"
    assert all(map(same_bits, solve(problem, "auto").tensors(), solve(problem, "reference").tensors()))


def test_auto_takes_the_cuda_kernels() -> None:
    problem = on_device(make_problem(tokens=401, width=40))
    assert choose("auto", "cuda", F32) == "cuda"
    assert all(map(same_bits, solve(problem, "auto").tensors(), solve(problem, "cuda").tensors()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_cpu_tensors_are_refused(backend: str) -> None:
    with pytest.raises(BackendUnavailable, match="the tensors are on cpu"):
        solve(make_problem(), backend)


@pytest.mark.parametrize("backend", ["cpu", *BACKENDS])
def test_tensors_of_two_devices_are_refused(backend: str) -> None:
    boxes = torch.rand(3, 4)
    key = torch.randn(3, 4, 8, device=DEVICE)
    student = QueryAttention(torch.randn(3, 8, device=DEVICE), key, 0.1)
    with pytest.raises(ValueError, match="region must be on cuda:0"):
        attention_terms(student, BoxRegion(boxes, (2, 2)), backend=backend)
