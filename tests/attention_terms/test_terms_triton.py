"""The Triton kernels of `attention_terms` on CPU tensors: small problems, for Triton's interpreter is slow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import needs_triton, poisoned_memory, same_bits
from helpers_attention import LAYOUTS, Problem, arrange, assert_solves, literal, make_problem, problem_of, solve
from helpers_exact import exact, extreme_problem
from helpers_pairwise import case_id, pairwise

from attbalance_ext import BoxRegion, QueryAttention, attention_terms
from tests.emulation import guarded

pytestmark = needs_triton
plans = pytest.importorskip("attbalance_ext.kernels.attention_terms.triton", reason="Triton is not installed")
forward_plan, backward_blocks, MAX_LAYERS = plans.forward_plan, plans.backward_blocks, plans.MAX_LAYERS

Edit = Callable[[Problem], None]
NAN, INF = math.nan, math.inf

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
    problem = problem_of(case, DTYPES[case["dtypes"]])
    if case["tokens"] == 33 and isinstance(problem.region, BoxRegion):
        problem.region = BoxRegion(problem.region.boxes, TWO_GRIDS, problem.region.rule)
    with poisoned_memory():
        solution = solve(problem, "triton")
    assert [g.dtype for g in solution.grad_key] == [k.dtype for k in problem.key]
    assert_solves(solution, literal(problem))


def test_layers_in_layouts_of_their_own() -> None:
    """Equations hold for layers that one launch cannot take together."""
    problem = make_problem(layers=4, batch=2, tokens=20, width=8, padded=True)
    layouts = ("batch_first", "sequence_first", "slice", "sequence_first")
    problem.key = [arrange(k, layout) for k, layout in zip(problem.key, layouts, strict=True)]
    solution = solve(problem, "triton")
    assert_solves(solution, literal(problem))
    assert [g.is_contiguous() for g in solution.grad_key] == [True, False, True, False]


def test_the_host_models_shape() -> None:
    """N=400 and D=256, whose tokens several programs share."""
    problem = make_problem(layers=2, batch=1, tokens=400, width=256, padded=True, teacher_distance=1e-2)
    assert forward_plan(2, 400, 256, 8, vector=4).splits > 1
    assert_solves(solve(problem, "triton"), literal(problem))


@pytest.mark.parametrize("width", [1024, 1030])
def test_wide_keys(width: int) -> None:
    """Beyond 1024 columns, several programs share the key sums."""
    problem = make_problem(layers=1, batch=2, tokens=21, width=width, key_dtype=(BF16,), padded=True)
    assert (forward_plan(2, 21, width, 8, vector=2).chunks > 1) == (width > 1024)
    assert_solves(solve(problem, "triton"), literal(problem))


def test_more_layers_than_one_launch_holds() -> None:
    problem = make_problem(layers=MAX_LAYERS + 1, batch=1, tokens=5, width=4, padded=True)
    assert_solves(solve(problem, "triton"), literal(problem))


@pytest.mark.parametrize("padded", [False, True])
def test_same_bits_on_every_run(padded: bool) -> None:
    problem = make_problem(layers=1, batch=2, tokens=280, key_dtype=(BF16,), padded=padded)
    first, second = (solve(problem, "triton").tensors() for _ in range(2))
    assert all(map(same_bits, first, second))


# --- edge cases: what the reference makes of them, and no other sample touched ----------------------------------------


def _set(tensor: str, sample: int, value: float, layer: int = 1, token: int = 7) -> Edit:
    def edit(problem: Problem) -> None:
        if tensor == "query":
            problem.query[layer][sample, 3] = value
        elif tensor == "key":
            problem.key[layer][sample, token, 3] = value
        elif tensor == "teacher":
            problem.teacher.key[layer][sample, token, 3] = value
        else:
            problem.region[sample, token] = value

    return edit


def _empty_region(problem: Problem) -> None:
    problem.region[1] = 0


def _whole_region(problem: Problem) -> None:
    problem.region[1] = 1


def _all_padding(problem: Problem) -> None:
    problem.padding[1] = True


def _region_at_padding(problem: Problem) -> None:
    problem.region[1] = problem.padding[1].float()


def _overflow(problem: Problem) -> None:
    problem.query[1][1] = 1e20
    problem.key[1][1, 7] = 1e20


def _far_scores(problem: Problem) -> None:
    problem.query[1][1] *= 1e11


EDGES: dict[str, Edit] = {
    "empty region": _empty_region,
    "whole region": _whole_region,
    "all padding": _all_padding,
    "region at padding": _region_at_padding,
    "overflow": _overflow,
    "far scores": _far_scores,
    "weight NaN": _set("region", 1, NAN),
    "weight infinite": _set("region", 1, INF),
    "weight negative": _set("region", 1, -INF),
    **{f"{name} {value}": _set(name, 1, value) for name in ("key", "query", "teacher") for value in (NAN, INF, -INF)},
}


@pytest.mark.parametrize("edit", EDGES.values(), ids=EDGES)
def test_edge_cases(edit: Edit) -> None:
    def problem() -> Problem:
        made = make_problem(layers=2, batch=2, tokens=20, region="weights", padded=True)
        made.padding[:, 7] = False
        for key in (*made.key, *made.teacher.key):
            key[:, 7].nan_to_num_(0.5)
        return made

    clean, edited = problem(), problem()
    edit(edited)
    with poisoned_memory():
        found = solve(edited, "triton")
    expected, untouched = solve(edited, "reference"), solve(clean, "triton")
    assert torch.equal(found.terms.valid, expected.terms.valid)
    for actual, wanted in zip(found.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
    for actual, before in zip(found.terms[:3], untouched.terms[:3], strict=True):
        assert same_bits(actual[:, 0], before[:, 0])
    for actual, before in zip(
        found.grad_query + found.grad_key, untouched.grad_query + untouched.grad_key, strict=True
    ):
        assert same_bits(actual[0], before[0])


@pytest.mark.parametrize("distance", [1.0, 1e-6])
def test_both_ends_against_60_digits(distance: float) -> None:
    """A_in near 0 and near 1, and a teacher that almost agrees."""
    problem = extreme_problem([1e-30, 1e-4, 0.499, 0.9, 1 - 1e-8], distance, F32)
    assert_solves(solve(problem, "triton"), exact(problem))


def test_edge_cases_of_a_token_that_is_not_its_slot_s_first() -> None:
    """An infinite score of it would vanish beside a finite one, or be taken for certain."""
    problem = make_problem(layers=1, batch=3, tokens=140, width=40, teacher_dtype=None)
    clean = solve(problem, "triton").terms
    problem.query[0][1:, 3] = 1
    problem.key[0][1, 139, 3], problem.key[0][2, 60, 3] = -INF, INF
    terms = solve(problem, "triton").terms
    for term, before in zip(terms[:2], clean[:2], strict=True):
        assert term[0, 1:].isnan().all()
        assert same_bits(term[0, 0], before[0, 0])


@pytest.mark.parametrize("rule", ["touch", "center", "coverage", "nearest"])
def test_region_weights_have_the_reference_s_bits(rule: str) -> None:
    """A_in of a sample in which a single token is not padding is that token's weight."""
    tokens = sum(rows * columns for rows, columns in TWO_GRIDS)
    boxes = torch.rand(tokens, 4, generator=torch.Generator().manual_seed(1))
    boxes[3, 0], boxes[5, 2], boxes[7, 3] = NAN, -0.5, INF
    region = BoxRegion(boxes, TWO_GRIDS, rule)
    student = QueryAttention(torch.zeros(tokens, 4), torch.zeros(tokens, tokens, 4), 1.0, ~torch.eye(tokens).bool())
    terms = attention_terms(student, region, backend="triton")
    assert same_bits(terms.in_box[0], region.mask().diagonal().clone())
    assert 0 < terms.valid.sum() < tokens


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_only_what_is_needed_is_computed() -> None:
    problem = make_problem(layers=3, tokens=20)
    whole = solve(problem, "triton")
    needed_query, needed_key = [False, True, False], [True, False, False]
    query = [q.clone().requires_grad_(flag) for q, flag in zip(problem.query, needed_query, strict=True)]
    key = [k.clone().requires_grad_(flag) for k, flag in zip(problem.key, needed_key, strict=True)]
    terms = attention_terms(problem.student(query, key), problem.region, teacher=problem.teacher, backend="triton")
    loss = sum((g * term).sum() for g, term in zip(problem.incoming, terms[:3], strict=True))
    found = torch.autograd.grad(loss, [query[1], key[0]])
    assert all(map(same_bits, found, [whole.grad_query[1], whole.grad_key[0]]))


@pytest.mark.parametrize("layout", ["sequence_first", "sequence_first_slice"])
def test_sequence_first_keys_get_sequence_first_gradients(layout: str) -> None:
    for gradient in solve(make_problem(batch=2, tokens=9, layout=layout), "triton").grad_key:
        assert gradient.transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("layout", ["batch_first", "sequence_first_slice", "wide_rows"])
@pytest.mark.parametrize("width", [32, 33])
def test_nothing_beyond_the_inputs_is_read(width: int, layout: str, side: str) -> None:
    """Every input ends, or begins, at a page that may not be touched: a read beyond it would end the process."""
    problem = make_problem(layers=1, batch=2, tokens=31, width=width, layout=layout, padded=True)
    walled = replace(
        problem,
        query=[guarded(q, side) for q in problem.query],
        key=[guarded(k, side) for k in problem.key],
        padding=guarded(problem.padding, side),
        teacher=QueryAttention(
            [guarded(q, side) for q in problem.teacher.query],
            [guarded(k, side) for k in problem.teacher.key],
            problem.teacher.scale,
        ),
        region=replace(problem.region, boxes=guarded(problem.region.boxes, side)),
    )
    assert_solves(solve(walled, "triton"), literal(problem))


def test_opcheck() -> None:
    query, key = torch.randn(1, 4), torch.randn(1, 3, 4)
    arguments = ([query], [key], [0.5], torch.rand(1, 3), [], 0, None, [query], [key], [0.5], True)
    ops = torch.ops.attbalance_ext
    torch.library.opcheck(ops.attention_terms.triton, arguments)
    in_box, _, _, _, *kept = ops.attention_terms.triton(*arguments)
    incoming = [torch.randn(1, 1) for _ in range(3)]
    flags = [False], [True], [True], True
    torch.library.opcheck(
        ops.attention_terms_backward.triton,
        (*incoming, [query], [0.5], arguments[3], [], 0, None, in_box, *kept, [0], *flags),
    )


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_splits_fill_the_device_and_no_more() -> None:
    for multiprocessors in (1, 16, 132, 148):
        for rows in (1, 6, 48, 192, 100_000):
            for tokens in (1, 31, 400, 1369, 20_000):
                plan = forward_plan(rows, tokens, 256, multiprocessors, vector=8)
                assert 1 <= plan.splits <= 16
                assert plan.splits == 1 or plan.splits * rows <= 4 * multiprocessors
                assert plan.splits == 1 or tokens // plan.splits >= 4 * plan.block_tokens
                block_tokens, block_dim = backward_blocks(rows, tokens, 256, multiprocessors)
                assert block_tokens * block_dim <= 4096
    assert forward_plan(48, 400, 256, 132, vector=8).splits > 4
    assert forward_plan(384, 400, 256, 132, vector=8).splits == 1


@pytest.mark.parametrize("dim", [1, 7, 32, 250, 256, 768, 1024, 2048])
def test_a_thread_holds_few_keys_whatever_its_loads_read(dim: int) -> None:
    for vector in (1, 2, 4, 8):
        plan = forward_plan(48, 400, dim, 132, vector=vector)
        assert plan.block_tokens >= 2
        assert plan.block_tokens * plan.block_dim <= 128 * 16
