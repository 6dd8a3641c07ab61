"""`attention_terms` where naive formulas lose every digit: A_in near 0 and 1, a teacher that almost agrees."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from helpers import BACKENDS, DOUBLE, NATIVE, needs_triton
from helpers_attention import Problem, Truth, assert_solves, make_problem, solve
from helpers_exact import exact, extreme_problem

IN_BOX = [1e-30, 1e-12, 1e-4, 0.3, 0.499, 0.501, 0.9, 1 - 1e-4, 1 - 1e-8]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DISTANCES = [1.0, 1e-3, 1e-6, float("inf")]


@functools.cache
def solved(distance: float, dtype: torch.dtype) -> tuple[Problem, Truth]:
    problem = extreme_problem(IN_BOX, distance, dtype)
    return problem, exact(problem)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*((name, dtype) for name in BACKENDS for dtype in DTYPES), *((name, torch.float64) for name in DOUBLE)],
    ids=str,
)
def test_both_ends_against_60_digits(backend: str, distance: float, dtype: torch.dtype) -> None:
    problem, truth = solved(distance, dtype)
    assert_solves(solve(problem, backend), truth)


def test_the_problems_reach_both_ends() -> None:
    problem, truth = solved(1e-6, torch.float32)
    in_box, rac = truth.terms.in_box[0], truth.terms.rac[0]
    assert in_box[0] < 3e-30
    assert 1e-9 < rac[-1] < 4e-8  # 1 - A_in, of which float32 keeps nothing
    assert (in_box.log10() - torch.tensor(IN_BOX).log10()).abs().max() < 0.5
    assert (truth.terms.mrc < 1e-11).all()
    assert (problem.weights() == 0.5).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_teacher_equal_to_student(backend: str) -> None:
    """KL(p || p) is 0 up to the square of rounding, and pulls at nothing."""
    problem = extreme_problem(IN_BOX, 0.0, torch.float32)
    problem.incoming = (torch.zeros(1, 9), torch.zeros(1, 9), torch.ones(1, 9))
    solution = solve(problem, backend)
    assert (solution.terms.mrc >= 0).all()
    assert solution.terms.mrc.max() < 1e-12
    assert solution.grad_key[0].abs().max() < 1e-6 * 0.11 * problem.query[0].abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(5))
def test_kl_is_never_negative(backend: str, seed: int) -> None:
    for distance in (1e-7, 1e-4, 1.0):
        problem = make_problem(
            batch=8, tokens=31, width=8, spread=4.0, teacher_distance=distance, padded=True, seed=seed
        )
        assert (solve(problem, backend).terms.mrc >= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("winner", ["inside", "outside"])
def test_one_token_holds_all_mass(backend: str, winner: str) -> None:
    """Scores hundreds apart: all probabilities but one underflow to 0, RAC and MRC stay finite and exact."""
    scores = torch.full((1, 6), -150.0)
    scores[0, 0 if winner == "inside" else 5] = 150
    weights = torch.tensor([[1.0, 1, 0, 0, 0, 0]])
    teacher = torch.full((1, 6), -50.0)
    teacher[0, 3] = 50
    problem = one_channel(scores, weights, teacher)
    solution, truth = solve(problem, backend), exact(problem)
    assert_solves(solution, truth)
    expected = 0.0 if winner == "inside" else 600 - 2 * math.log(2)
    torch.testing.assert_close(solution.terms.rac, torch.full((1, 1), expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(solution.terms.mrc, torch.full((1, 1), 300.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_teacher_mass_that_underflows(backend: str) -> None:
    """Where t_j is 0 in float32, the token adds p_j to the KL sum's stable form and p_j to its gradient."""
    teacher = torch.tensor([[0.0, 0.0, -200, -200, 0, 0]])
    problem = one_channel(torch.zeros(1, 6), torch.tensor([[1.0, 1, 0, 0, 0, 0]]), teacher)
    problem.incoming = (torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1))
    solution = solve(problem, backend)
    torch.testing.assert_close(solution.terms.mrc, torch.full((1, 1), 6 / 4).log(), rtol=1e-6, atol=0)
    expected = torch.tensor([1 / 6 - 1 / 4] * 2 + [1 / 6] * 2 + [1 / 6 - 1 / 4] * 2)
    torch.testing.assert_close(solution.grad_key[0][0, :, 0], expected)


def one_channel(
    products: torch.Tensor, weights: torch.Tensor, teacher: torch.Tensor, scale: tuple[float, float] = (1.0, 1.0)
) -> Problem:
    """L = B = D = 1 with the products q . k and the scales of student and teacher given."""
    problem = extreme_problem([0.5], 0.0, torch.float32, tokens=products.shape[1], width=1)
    problem.query, problem.key, problem.scale = [torch.ones(1, 1)], [products[..., None]], [scale[0]]
    problem.region = weights
    problem.teacher = type(problem.teacher)(torch.ones(1, 1), teacher[..., None], scale[1])
    return problem


# Products without rounding, and weights, for what the native kernels do after them.
PRODUCTS, WEIGHTS = torch.arange(12.0)[None] * 5 % 7, torch.tensor([[1.0, 1, 1, 0.5, *[0] * 8]])
FUSED = [*NATIVE, pytest.param("triton", marks=needs_triton)]


@pytest.mark.parametrize("backend", FUSED)
def test_scaling_rounds_no_score(backend: str) -> None:
    """Of scores of 1e4, float32 keeps 3 digits of what tells them apart."""
    problem = one_channel(60_000 + PRODUCTS, WEIGHTS, 60_000 + PRODUCTS.flip(1), (0.1777, 0.1777))
    terms, truth = solve(problem, backend).terms, exact(problem).terms
    for found, expected in zip(terms[:3], truth[:3], strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    rounded = (problem.key[0] * 0.1777)[..., 0].softmax(-1)
    assert ((rounded * WEIGHTS).sum() / truth.in_box - 1).abs() > 1e-5  # else this proves nothing


@pytest.mark.parametrize("backend", FUSED)
def test_kl_to_a_teacher_whose_scale_alone_is_another(backend: str) -> None:
    """log p and log t differ by less than either is rounded by."""
    problem = one_channel(PRODUCTS, WEIGHTS, PRODUCTS, (0.5777, 0.5777 * (1 + 1e-6)))
    mrc = solve(problem, backend).terms.mrc.double()
    torch.testing.assert_close(mrc, exact(problem).terms.mrc, rtol=5e-3, atol=0)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("layers", "tokens"), [(6, 400), (1, 1369)])
def test_host_model_shapes(backend: str, dtype: torch.dtype, layers: int, tokens: int) -> None:
    """B=9, D=256, every regime of A_in side by side, against the reference in float64."""
    problem = extreme_problem(IN_BOX, 1.0, dtype, tokens=tokens, width=256, layers=layers)
    truth = solve(problem.to(torch.float64), "reference")
    solution = solve(problem, backend)
    for actual, expected in zip(solution.terms[:3], truth.terms[:3], strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=0)
    bound = {torch.float32: 2e-5, torch.bfloat16: 4e-3}[dtype]
    for gradients in ("grad_query", "grad_key"):
        for actual, expected in zip(getattr(solution, gradients), getattr(truth, gradients), strict=True):
            error = (actual.double() - expected).flatten(1).norm(dim=1)
            assert (error <= bound * expected.flatten(1).norm(dim=1)).all()
