"""Values and gradients of `attention_terms` against the literal equations, over a pairwise covering set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import BACKENDS, DOUBLE
from helpers_attention import (
    GRIDS,
    LAYOUTS,
    arrange,
    assert_solves,
    literal,
    make_problem,
    problem_of,
    solve,
    tensor_errors,
)
from helpers_pairwise import case_id, pairwise
from hypothesis import assume, given
from hypothesis import strategies as st

from attbalance_ext import QueryAttention

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# query by layer, key by layer, teacher
DTYPES = {
    "f32": ((F32,), (F32,), F32),
    "f64": ((F64,), (F64,), F64),
    "bf16": ((BF16,), (BF16,), BF16),
    "f16": ((F16,), (F16,), F16),
    "f32_bf16": ((F32,), (BF16,), BF16),
    "bf16_f32": ((BF16,), (F32,), F32),
    "by_layer": ((F32, BF16, F16), (BF16, F32, F32, F16), F32),
    "f64_f32": ((F64,), (F32,), F32),
    "f32_f64": ((F32,), (F64,), BF16),
    "teacher_bf16": ((F32,), (F32,), BF16),
    "teacher_f64": ((BF16,), (BF16,), F64),
}

FACTORS: dict[str, list[Any]] = {
    "dtypes": list(DTYPES),
    "tokens": list(GRIDS),
    "batch": [0, 1, 3, 8],
    "layers": [1, 4, 6],
    "width": [1, 7, 32, 256],
    "layout": list(LAYOUTS),
    "region": ["touch", "center", "coverage", "nearest", "weights", "bool"],
    "padded": ["dense", "padded"],
    "teacher": ["alone", "far", "near"],
    "attention": ["flat", "soft", "sharp"],
}
SPREAD = {"flat": 1e-2, "soft": 1.0, "sharp": 8.0}
DISTANCE = {"alone": None, "far": 1.0, "near": 1e-2}


def small_enough(case: dict[str, Any]) -> bool:
    return case["batch"] * case["layers"] * case["tokens"] * case["width"] <= 3_000_000


def in_double(dtypes: str) -> bool:
    query, key, _ = DTYPES[dtypes]
    return F64 in (*query, *key)


CASES = pairwise(FACTORS, small_enough)
SINGLE_CASES = pairwise(
    FACTORS | {"dtypes": [dtypes for dtypes in DTYPES if not in_double(dtypes)]}, small_enough, seed=1
)
RUNS = [(case, backend) for backend in BACKENDS for case in (CASES if backend in DOUBLE else SINGLE_CASES)]


@pytest.mark.parametrize(
    ("case", "backend"), RUNS, ids=lambda value: value if isinstance(value, str) else case_id(value)
)
def test_against_the_equations(case: dict[str, Any], backend: str) -> None:
    query, key, _ = DTYPES[case["dtypes"]]
    wide = in_double(case["dtypes"])
    words = {
        "padded": case["padded"] == "padded",
        "spread": SPREAD[case["attention"]],
        "distance": DISTANCE[case["teacher"]],
    }
    problem = problem_of(case | words, DTYPES[case["dtypes"]])
    solution = solve(problem, backend)
    assert {term.dtype for term in solution.terms[:3]} == {F64 if wide else F32}
    assert [g.dtype for g in solution.grad_query] == [q.dtype for q in problem.query]
    assert [g.dtype for g in solution.grad_key] == [k.dtype for k in problem.key]
    truth = literal(problem)
    assert_solves(solution, truth)
    for name, error in tensor_errors(solution, truth).items():
        low_precision = name.startswith("grad") and {*query, *key} & {BF16, F16}
        assert error <= (3e-2 if low_precision else 2e-5), name


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    layers=st.integers(1, 3),
    batch=st.integers(0, 4),
    tokens=st.integers(1, 150),
    width=st.integers(1, 70),
    dtypes=st.sampled_from(list(DTYPES)),
    layout=st.sampled_from(LAYOUTS),
    region=st.sampled_from(FACTORS["region"]),
    padded=st.booleans(),
    spread=st.floats(0.01, 8),
    teacher_distance=st.none() | st.floats(1e-3, 2),
    seed=st.integers(0, 1000),
)
def test_any_shape(backend: str, dtypes: str, teacher_distance: float | None, **options: Any) -> None:
    assume(backend in DOUBLE or not in_double(dtypes))
    query, key, teacher = DTYPES[dtypes]
    problem = make_problem(
        query_dtype=query,
        key_dtype=key,
        teacher_dtype=None if teacher_distance is None else teacher,
        teacher_distance=teacher_distance or 0,
        **options,
    )
    assert_solves(solve(problem, backend), literal(problem))


@pytest.mark.parametrize("width", [16, 19])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_teacher_in_a_layout_of_its_own(backend: str, layout: str, width: int) -> None:
    problem = make_problem(tokens=40, width=width, padded=True)
    teacher = problem.teacher
    assert teacher is not None
    problem.teacher = QueryAttention(teacher.query, [arrange(k, layout) for k in teacher.key], teacher.scale)
    assert_solves(solve(problem, backend), literal(problem))


def test_the_cases_cover_what_they_say() -> None:
    for cases, dtypes in ((CASES, DTYPES), (SINGLE_CASES, [name for name in DTYPES if not in_double(name)])):
        pairs = {(case["dtypes"], case["tokens"]) for case in cases}
        assert pairs == {(name, tokens) for name in dtypes for tokens in GRIDS}
        assert len(cases) < 150
