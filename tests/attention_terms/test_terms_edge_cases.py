"""Degenerate regions, padding, values that are not finite, empty batches: each has one defined result."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import BACKENDS, poisoned_memory, same_bits
from helpers_attention import Problem, Solution, assert_solves, literal, make_problem, solve
from torch import Tensor

from attbalance_ext import BoxRegion, QueryAttention, attention_terms

pytestmark = pytest.mark.parametrize("backend", BACKENDS)

NAN, INF = math.nan, math.inf


def with_incoming(problem: Problem, in_box: float, rac: float, mrc: float) -> Problem:
    shape = problem.incoming[0].shape
    return replace(problem, incoming=tuple(torch.full(shape, float(value)) for value in (in_box, rac, mrc)))


def assert_same_except(a: Solution, b: Solution, sample: int, layer: int | None = None) -> None:
    """Every bit of terms and gradients equal outside one sample, or one sample of one layer."""
    layers = len(a.grad_key)
    touched = range(layers) if layer is None else [layer]
    for x, y in zip(a.terms[:3], b.terms[:3], strict=True):
        x, y = x.clone(), y.clone()
        x[touched, sample] = y[touched, sample] = 0
        assert same_bits(x, y)
    for gradients in ("grad_query", "grad_key"):
        for position in range(layers):
            x, y = getattr(a, gradients)[position].clone(), getattr(b, gradients)[position].clone()
            if position in touched:
                x[sample] = y[sample] = 0
            assert same_bits(x, y), f"{gradients}[{position}] differs"


# --- regions ---------------------------------------------------------------------------------------------------------

EMPTY_BOXES = {
    "no width": [0.5, 0.5, 0.0, 0.5],
    "no height": [0.5, 0.5, 0.5, 0.0],
    "outside": [1.5, 0.5, 0.4, 0.4],
    "left of the canvas": [-0.3, 0.5, 0.4, 0.4],
    "inverted": [0.5, 0.5, -0.4, 0.4],
    "nan": [NAN, 0.5, 0.4, 0.4],
    "nan size": [0.5, 0.5, 0.4, NAN],
    "infinite center": [INF, 0.5, 0.4, 0.4],
}


@pytest.mark.parametrize("box", EMPTY_BOXES.values(), ids=EMPTY_BOXES)
@pytest.mark.parametrize("rule", ["touch", "center", "coverage", "nearest"])
def test_empty_region(backend: str, box: list[float], rule: str) -> None:
    problem = make_problem(batch=3, tokens=400, width=8)
    assert isinstance(problem.region, BoxRegion)
    boxes = problem.region.boxes.clone()
    boxes[1] = torch.tensor(box)
    empty = replace(problem, region=BoxRegion(boxes, (20, 20), rule))
    whole = replace(problem, region=BoxRegion(problem.region.boxes, (20, 20), rule))
    solution, others = solve(empty, backend), solve(whole, backend)
    assert solution.terms.valid.tolist() == [True, False, True]
    assert (solution.terms.rac[:, 1] == 0).all()
    assert (solution.terms.in_box[:, 1] == 0).all()
    assert_solves(solution, literal(empty))
    assert_same_except(solution, others, sample=1)
    without_mrc = solve(with_incoming(empty, 1, 1, 0), backend)
    for gradient in (*without_mrc.grad_query, *without_mrc.grad_key):
        assert (gradient[1] == 0).all()
        assert (gradient[0] != 0).any()


def test_region_only_at_padding_is_empty(backend: str) -> None:
    problem = make_problem(region="weights", padded=True)
    weights = torch.zeros_like(problem.weights())
    weights[problem.padding] = 1
    problem = replace(problem, region=weights)
    solution = solve(problem, backend)
    assert not solution.terms.valid.any()
    assert_solves(solution, literal(problem))


def test_empty_region_hides_scores_that_are_not_finite(backend: str) -> None:
    problem = make_problem(batch=2, region="weights")
    problem.region = torch.stack([torch.zeros(31), torch.ones(31)])
    problem.key[0][0, 3] = NAN
    problem.key[1][0, 3] = INF
    terms = solve(problem, backend).terms
    assert (terms.rac[:, 0] == 0).all()
    assert (terms.in_box[:, 0] == 0).all()
    assert terms.mrc[:, 0].isnan().all()
    assert terms.valid.tolist() == [False, True]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("spread", [0.1, 10.0])
def test_region_covers_every_token(backend: str, padded: bool, spread: float) -> None:
    problem = make_problem(batch=4, tokens=400, region="weights", padded=padded, spread=spread)
    covering = torch.ones(4, 400)
    if padded:
        covering[problem.padding] = 0
    regions = {"weights": covering, "box": BoxRegion(torch.tensor([[0.5, 0.5, 1, 1]] * 4), (20, 20))}
    for region in regions.values():
        whole = replace(problem, region=region)
        solution = solve(whole, backend)
        assert (solution.terms.rac == 0).all()
        assert (solution.terms.in_box == 1).all()
        for gradient in (lambda s: [*s.grad_query, *s.grad_key])(solve(with_incoming(whole, 1, 1, 0), backend)):
            assert (gradient == 0).all()


def test_weights_outside_0_1_are_clamped(backend: str) -> None:
    problem = make_problem(region="weights")
    wild = 3 * torch.randn(3, 31)
    wild[0, :2] = torch.tensor([INF, -INF])
    a, b = (solve(replace(problem, region=region), backend) for region in (wild, wild.clamp(0, 1)))
    assert all(map(same_bits, a.tensors(), b.tensors()))
    assert 0 < a.terms.in_box.min() < a.terms.in_box.max() < 1


def test_weight_that_is_nan_reaches_its_sample(backend: str) -> None:
    problem = make_problem(region="weights", padded=True)
    clean = solve(problem, backend)
    weights = problem.weights().float()
    weights[problem.padding] = NAN  # ignored
    weights[1, 31 // 2] = NAN
    solution = solve(replace(problem, region=weights), backend)
    assert solution.terms.in_box[:, 1].isnan().all()
    assert solution.terms.rac[:, 1].isnan().all()
    assert solution.terms.mrc.isfinite().all()
    assert solution.terms.valid.all()  # the others, and NaN, which is no region without tokens
    assert_same_except(solution, clean, sample=1)


def test_region_and_teacher_get_no_gradient(backend: str) -> None:
    problem = make_problem(tokens=400)
    assert isinstance(problem.region, BoxRegion)
    assert problem.teacher is not None
    boxes = problem.region.boxes.clone().requires_grad_()
    weights = torch.rand(3, 400, requires_grad=True)
    teacher = QueryAttention(
        [q.requires_grad_() for q in problem.teacher.query], [k.requires_grad_() for k in problem.teacher.key], 0.1
    )
    for region in (BoxRegion(boxes, (20, 20), "coverage"), weights):
        query = [q.clone().requires_grad_() for q in problem.query]
        terms = attention_terms(problem.student(query), region, teacher=teacher, backend=backend)
        sum(term.sum() for term in terms[:3]).backward()
        assert all(q.grad is not None for q in query)
    assert boxes.grad is None
    assert weights.grad is None
    assert all(tensor.grad is None for tensor in (*teacher.query, *teacher.key))


# --- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e38])
def test_values_at_padding_are_never_used(backend: str, value: float) -> None:
    problem = make_problem(tokens=401, padded=True, width=40)
    assert problem.padding is not None
    assert problem.teacher is not None
    solutions = []
    for filling in (0.0, value):
        for key in (*problem.key, *problem.teacher.key):
            key[problem.padding] = filling
        solutions.append(solve(problem, backend))
    assert all(map(same_bits, solutions[0].tensors(), solutions[1].tensors()))
    for gradient in solutions[1].grad_key:
        assert (gradient[problem.padding] == 0).all()
    assert_solves(solutions[1], literal(problem))


def test_padding_reaches_no_score(backend: str) -> None:
    """p and t of the other tokens are those of the shorter sequence."""
    problem = make_problem(batch=2, tokens=31, region="weights")
    padding = torch.zeros(2, 31, dtype=torch.bool)
    padding[:, 20:] = True
    short = replace(
        problem,
        key=[k[:, :20] for k in problem.key],
        region=problem.weights()[:, :20].float(),
        teacher=QueryAttention(problem.teacher.query, [k[:, :20] for k in problem.teacher.key], problem.teacher.scale),
    )
    a, b = solve(replace(problem, padding=padding), backend), solve(short, backend)
    for x, y in zip(a.terms, b.terms, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=0)
    for x, y in zip(a.grad_key, b.grad_key, strict=True):
        torch.testing.assert_close(x[:, :20], y, rtol=1e-5, atol=1e-8)


def test_every_token_of_a_sample_is_padding(backend: str) -> None:
    problem = make_problem(batch=3, tokens=31, padded=True, region="weights")
    clean = solve(problem, backend)
    padding = problem.padding.clone()
    padding[1] = True
    with poisoned_memory():
        solution = solve(replace(problem, padding=padding), backend)
    assert solution.terms.valid.tolist() == [True, False, True]
    for term in solution.terms[:3]:
        assert (term[:, 1] == 0).all()
    for gradient in (*solution.grad_query, *solution.grad_key):
        assert (gradient[1] == 0).all()
    assert_same_except(solution, clean, sample=1)


def test_key_padding_mask_overrides_the_attention_s_padding(backend: str) -> None:
    problem = make_problem(padded=True)
    other = torch.zeros(3, 31, dtype=torch.bool)
    other[:, :9] = True
    for key in (*problem.key, *problem.teacher.key):
        key.nan_to_num_(1.0)
    terms = attention_terms(
        problem.student(), problem.region, teacher=problem.teacher, key_padding_mask=other, backend=backend
    )
    expected = literal(replace(problem, padding=other)).terms
    for term, truth in zip(terms[:3], expected[:3], strict=True):
        torch.testing.assert_close(term.double(), truth, rtol=2e-5, atol=1e-9)


def test_teacher_s_own_padding_is_not_used(backend: str) -> None:
    """The student's padding holds for both, so that the two maps live on the same tokens."""
    problem = make_problem()
    teacher = problem.teacher
    padded = QueryAttention(teacher.query, teacher.key, teacher.scale, torch.ones(3, 31, dtype=torch.bool))
    a, b = (attention_terms(problem.student(), problem.region, teacher=t, backend=backend) for t in (teacher, padded))
    assert same_bits(a.mrc, b.mrc)


# --- values that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("where", ["key inside", "key outside", "query"])
def test_score_that_is_not_finite_stays_in_its_row(backend: str, value: float, sign: float, where: str) -> None:
    problem = make_problem(layers=3, batch=3, tokens=401, width=20, padded=True, region="weights")
    region = (torch.arange(401) < 100).float().repeat(3, 1)
    problem = replace(problem, region=region)
    problem.query[1][2, 5] = sign
    clean = solve(problem, backend)
    token = {"key inside": 50, "key outside": 300, "query": None}[where]
    if token is None:
        problem.query[1][2, 5] = value
    else:
        problem.padding[2, token] = False
        problem.key[1][2, token] = 0
        for key in (*problem.key, *problem.teacher.key):  # it was padding: give the other rows numbers
            key[2, token] = 0.1
        clean = solve(problem, backend)
        problem.key[1][2, token, 5] = value
    solution = solve(problem, backend)
    for term in solution.terms[:3]:
        assert term[1, 2].isnan()
    assert solution.terms.valid.all()
    assert solution.grad_query[1][2].isnan().all()
    padding = problem.padding[2]
    assert solution.grad_key[1][2][~padding].isnan().all()
    assert (solution.grad_key[1][2][padding] == 0).all()
    assert_same_except(solution, clean, sample=2, layer=1)


@pytest.mark.parametrize("width", [20, 21])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_teacher_score_that_is_not_finite(backend: str, value: float, width: int) -> None:
    """MRC and every gradient of the row are NaN; RAC and A_in do not know the teacher."""
    problem = make_problem(layers=2, batch=3, tokens=401, width=width)
    problem.teacher.query[1][2] = 1
    clean = solve(problem, backend)
    problem.teacher.key[1][2, 7, 5] = value
    solution = solve(problem, backend)
    assert solution.terms.mrc[1, 2].isnan()
    assert same_bits(solution.terms.rac, clean.terms.rac)
    assert same_bits(solution.terms.in_box, clean.terms.in_box)
    assert solution.grad_query[1][2].isnan().all()
    assert solution.grad_key[1][2].isnan().all()
    assert_same_except(solution, clean, sample=2, layer=1)


@pytest.mark.parametrize("width", [20, 21])
def test_query_that_is_not_finite_gives_padding_no_gradient(backend: str, width: int) -> None:
    problem = make_problem(batch=3, tokens=40, width=width, padded=True)
    problem.padding[1] = True
    problem.query[0][:, 3] = NAN
    gradient = solve(problem, backend).grad_key[0]
    assert (gradient[problem.padding] == 0).all()
    assert gradient[~problem.padding].isnan().all()


@pytest.mark.parametrize("size", [1e7, 1e10, 1e12])
@pytest.mark.parametrize("width", [20, 21])
def test_finite_scores_give_finite_terms(backend: str, size: float, width: int) -> None:
    """However far apart: the largest score has all the mass."""
    problem = make_problem(batch=8, tokens=40, width=width, region="weights", teacher_dtype=None)
    problem = replace(problem, key=[k * size for k in problem.key], region=(torch.arange(40) % 2).float().repeat(8, 1))
    terms = solve(problem, backend).terms
    best = torch.stack(
        [
            (k.double() @ q.double()[..., None])[..., 0].argmax(1)
            for q, k in zip(problem.query, problem.key, strict=True)
        ]
    )
    assert torch.equal(terms.in_box, (best % 2).to(terms.in_box.dtype))
    assert terms.rac.isfinite().all()


def test_score_that_overflows_is_nan(backend: str) -> None:
    """Finite inputs whose product is not: a certain score must not come out of it."""
    problem = make_problem(batch=1, layers=1)
    problem.query[0][:] = 1e20
    problem.key[0][0, 3] = 1e20
    terms = solve(problem, backend).terms
    assert all(term.isnan().all() for term in terms[:3])


def test_all_scores_minus_infinity_are_nan(backend: str) -> None:
    problem = make_problem(batch=1, layers=1, region="weights")
    problem.query[0][:] = 1
    problem.key[0][:] = -INF
    solution = solve(problem, backend)
    assert all(term.isnan().all() for term in solution.terms[:3])
    assert solution.grad_key[0].isnan().all()


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_teacher", [False, True])
def test_empty_batch(backend: str, with_teacher: bool) -> None:
    problem = make_problem(layers=4, batch=0, tokens=500, teacher_dtype=torch.float32 if with_teacher else None)
    solution = solve(problem, backend)
    assert [tuple(term.shape) for term in solution.terms] == [(4, 0)] * 3 + [(0,)]
    assert [tuple(g.shape) for g in solution.grad_key] == [(0, 500, 16)] * 4
    assert [tuple(g.shape) for g in solution.grad_query] == [(0, 16)] * 4


@pytest.mark.parametrize("region", [BoxRegion(torch.tensor([[0.5] * 4, [2.0] * 4]), (2, 2)), torch.eye(2, 4) * 0.5])
def test_no_layers(backend: str, region: BoxRegion | Tensor) -> None:
    if isinstance(region, Tensor):
        region = region.clone()
        region[1] = 0
    terms = attention_terms(QueryAttention([], [], []), region, teacher=QueryAttention([], [], []), backend=backend)
    assert [tuple(term.shape) for term in terms] == [(0, 2)] * 3 + [(2,)]
    assert terms.valid.tolist() == [True, False]


def test_no_layers_and_a_region_only_at_padding(backend: str) -> None:
    region, padding = torch.eye(2, 4), torch.eye(2, 4, dtype=torch.bool)
    padding[1] = False
    terms = attention_terms(QueryAttention([], [], [], padding), region, backend=backend)
    assert terms.valid.tolist() == [False, True]
    with pytest.raises(ValueError, match=r"padding.*\(2, 4\).*\(4, 2\)"):
        attention_terms(QueryAttention([], [], [], padding.T), region, backend=backend)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_one_token(backend: str, weight: float) -> None:
    """p = 1: A_in is the token's weight, and nothing can pull at the score."""
    problem = make_problem(tokens=1, region="weights")
    problem.region = torch.full((3, 1), weight)
    solution = solve(problem, backend)
    torch.testing.assert_close(solution.terms.in_box, torch.full((2, 3), weight), rtol=1e-6, atol=0)
    expected = 0 if weight == 0 else -2 * math.log(weight)
    torch.testing.assert_close(solution.terms.rac, torch.full((2, 3), float(expected)), rtol=1e-6, atol=0)
    assert (solution.terms.mrc.abs() < 1e-12).all()
    assert all((gradient.abs() < 1e-6).all() for gradient in (*solution.grad_query, *solution.grad_key))


def test_without_a_teacher_mrc_is_0(backend: str) -> None:
    problem = make_problem(teacher_dtype=None)
    assert (solve(problem, backend).terms.mrc == 0).all()
    assert_solves(solve(problem, backend), literal(problem))


def test_single_tensors_are_one_layer(backend: str) -> None:
    problem = make_problem(layers=1, teacher_dtype=None)
    attention = QueryAttention(problem.query[0], problem.key[0], problem.scale[0])
    assert attention_terms(attention, problem.region, backend=backend).rac.shape == (1, 3)


def test_keys_shared_by_the_batch(backend: str) -> None:
    """An expanded key (stride 0 over the batch) is read in place; its gradient sums over the batch."""
    problem = make_problem(batch=3, teacher_dtype=None, layers=1)
    key = problem.key[0][:1].clone().requires_grad_()
    terms = attention_terms(problem.student(key=[key.expand(3, -1, -1)]), problem.region, backend=backend)
    (gradient,) = torch.autograd.grad((problem.incoming[1] * terms.rac).sum(), key)
    explicit = replace(with_incoming(problem, 0, 0, 0), key=[key.detach().expand(3, -1, -1).contiguous()])
    explicit.incoming[1].copy_(problem.incoming[1])
    torch.testing.assert_close(
        gradient.double(), literal(explicit).grad_key[0].sum(0, keepdim=True), rtol=2e-5, atol=1e-7
    )


def test_autocast_changes_nothing(backend: str) -> None:
    problem = make_problem(tokens=401, query_dtype=(torch.bfloat16,), key_dtype=(torch.float32,))
    gradients = []
    for enabled in (False, True):
        key = [k.clone().requires_grad_() for k in problem.key]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            terms = attention_terms(problem.student(key=key), problem.region, teacher=problem.teacher, backend=backend)
        assert terms.rac.dtype == torch.float32
        loss = sum(term.sum() for term in terms[:3])
        gradients.append([*terms[:3], *torch.autograd.grad(loss, key)])
    assert all(map(same_bits, *gradients))
