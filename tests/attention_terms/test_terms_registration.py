"""`attention_terms` as registered operators: schemas, fakes, and what they compute when."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import DOUBLE, NATIVE, same_bits
from helpers_attention import Problem, make_problem, solve

from attbalance_ext import BoxRegion
from attbalance_ext.kernels.attention_terms.reference import RULES
from attbalance_ext.kernels.ops import DTYPES


def forward_arguments(problem: Problem, need_key_means: bool = True) -> tuple:
    if isinstance(problem.region, BoxRegion):
        region, rule = problem.region.boxes, RULES.index(problem.region.rule)
        grids = [n for grid in problem.region.grids for n in grid]
    else:
        region, grids, rule = problem.region.to(problem.query[0].dtype), [], 0
    teacher = problem.teacher
    return (
        problem.query,
        problem.key,
        problem.scale,
        region,
        grids,
        rule,
        problem.padding,
        list(teacher.query) if teacher else [],
        list(teacher.key) if teacher else [],
        list(teacher.scale) if teacher else [],
        need_key_means,
    )


def backward_arguments(
    problem: Problem, backend: str, need_query: list[bool], need_key: list[bool], need_dot: bool
) -> tuple:
    arguments = forward_arguments(problem, any(need_query))
    query, key, scale, region, grids, rule, padding, *_ = arguments
    in_box, _, _, _, *kept = getattr(torch.ops.attbalance_ext.attention_terms, backend)(*arguments)
    dtypes = [DTYPES.index(k.dtype) for k in key]
    sequence_first = [k.stride(0) < k.stride(1) for k in key]
    common = (query, scale, region, grids, rule, padding, in_box, *kept)
    return *problem.incoming, *common, dtypes, sequence_first, need_query, need_key, need_dot


CASES = [
    {"layers": 1, "region": "touch"},
    {"layers": 3, "region": "weights", "padded": True, "teacher_dtype": None},
    {"layers": 2, "region": "coverage", "layout": "sequence_first", "key_dtype": (torch.bfloat16, torch.float16)},
    {"batch": 0, "region": "nearest"},
    {
        "region": "weights",
        "query_dtype": (torch.float64,),
        "key_dtype": (torch.float64,),
        "teacher_dtype": torch.float64,
    },
]


RUNS = [(backend, case) for backend in NATIVE for case in CASES if backend in DOUBLE or "query_dtype" not in case]


@pytest.mark.parametrize(("backend", "case"), RUNS, ids=str)
def test_opcheck_forward(backend: str, case: dict) -> None:
    problem = make_problem(**case)
    op = getattr(torch.ops.attbalance_ext.attention_terms, backend)
    for need_key_means in (False, True):
        torch.library.opcheck(op, forward_arguments(problem, need_key_means))


@pytest.mark.parametrize(("backend", "case"), RUNS, ids=str)
def test_opcheck_backward(backend: str, case: dict) -> None:
    problem = make_problem(**case)
    op = getattr(torch.ops.attbalance_ext.attention_terms_backward, backend)
    layers = len(problem.key)
    yes, no = [True] * layers, [False] * layers
    for need_query, need_key, need_dot in itertools.product((yes, no), (yes, no), (True, False)):
        torch.library.opcheck(op, backward_arguments(problem, backend, need_query, need_key, need_dot))


@pytest.mark.parametrize("backend", NATIVE)
def test_only_what_is_needed_is_computed(backend: str) -> None:
    problem = make_problem(layers=3)
    op = getattr(torch.ops.attbalance_ext.attention_terms_backward, backend)
    arguments = backward_arguments(problem, backend, [False, True, False], [True, False, True], False)
    grad_query, grad_key, grad_dot = op(*arguments)
    whole = solve(problem, backend)
    assert all(map(same_bits, grad_query, [whole.grad_query[1]]))
    assert all(map(same_bits, grad_key, [whole.grad_key[0], whole.grad_key[2]]))
    assert len(grad_query) == 1
    assert len(grad_key) == 2
    assert grad_dot.numel() == 0
    grad_query, grad_key, grad_dot = op(*backward_arguments(problem, backend, [False] * 3, [False] * 3, True))
    assert (len(grad_query), len(grad_key), grad_dot.shape) == (0, 0, (*whole.terms.rac.shape, 31))
    without_means = getattr(torch.ops.attbalance_ext.attention_terms, backend)(*forward_arguments(problem, False))
    assert without_means[-1].numel() == 0
