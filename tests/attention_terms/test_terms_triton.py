"""The Triton kernels of `attention_terms` on CPU tensors: small problems, for Triton's interpreter is slow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import poisoned_memory
from helpers_attention import LAYOUTS, assert_solves, literal, make_problem, solve
from helpers_pairwise import case_id, pairwise

from attbalance_ext import BoxRegion
from attbalance_ext.kernels.choose import BACKENDS

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS["triton"].devices, reason="Triton is not interpreted")

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
TWO_GRIDS = ((4, 6), (3, 3))

# query by layer, key by layer, teacher
DTYPES = {
    "f32": ((F32,), (F32,), F32),
    "bf16": ((BF16,), (BF16,), BF16),
    "f16": ((F16,), (F16,), F16),
    "by_layer": ((F32, BF16, F16), (BF16, F32, F32, F16), F32),
    "teacher_bf16": ((F32,), (F32,), BF16),
    "teacher_f64": ((BF16,), (BF16,), F64),
}
FACTORS: dict[str, list[Any]] = {
    "dtypes": list(DTYPES),
    "tokens": [1, 33, 70],
    "batch": [1, 2],
    "layers": [1, 2, 3],
    "width": [1, 7, 32, 40],
    "layout": list(LAYOUTS),
    "region": ["touch", "center", "coverage", "nearest", "weights"],
    "padded": [False, True],
    "distance": [None, 1.0, 1e-2],
    "spread": [1e-2, 1.0, 8.0],
}


@pytest.mark.parametrize("case", pairwise(FACTORS), ids=case_id)
def test_against_the_equations(case: dict[str, Any]) -> None:
    query, key, teacher = DTYPES[case["dtypes"]]
    problem = make_problem(
        layers=case["layers"],
        batch=case["batch"],
        tokens=case["tokens"],
        width=case["width"],
        query_dtype=query,
        key_dtype=key,
        teacher_dtype=None if case["distance"] is None else teacher,
        layout=case["layout"],
        region=case["region"],
        padded=case["padded"],
        spread=case["spread"],
        teacher_distance=case["distance"] or 0,
    )
    if case["tokens"] == 33 and isinstance(problem.region, BoxRegion):
        problem.region = BoxRegion(problem.region.boxes, TWO_GRIDS, problem.region.rule)
    with poisoned_memory():
        solution = solve(problem, "triton")
    assert [g.dtype for g in solution.grad_key] == [k.dtype for k in problem.key]
    assert_solves(solution, literal(problem))
