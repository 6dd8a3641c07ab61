"""Spearman's rho inside the op, against SciPy: ties, values that are not finite, batches and layers of every size."""

from __future__ import annotations

import pytest
import torch
from helpers import BACKENDS, NATIVE, poisoned_memory, same_bits
from helpers_loss import LossProblem, literal_rho, loss_errors, make_loss_problem, solve_loss
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attbalance_ext import AttBalanceConfig

NAN, INF = float("nan"), float("inf")


def ranking_problem(batch: int) -> LossProblem:
    """One layer for each kind of A_in; the IoU ties too, at 0 among others."""
    problem = make_loss_problem(layers=1, batch=batch, invalid=batch > 1, ties=True)
    problem.pred[::5, :2] += 1  # no overlap
    distinct = torch.rand(batch)
    some, all_but_one = torch.rand(batch) < 0.05, torch.arange(batch) != batch // 2
    kinds: dict[str, Tensor] = {
        "distinct": distinct,
        "ties": (distinct * 5).floor(),
        "constant": torch.full((batch,), 0.25),
        "follows the IoU": 1 - (problem.pred - problem.target).abs().sum(-1),
        "signed zeros": torch.where(distinct < 0.3, -0.0, torch.where(distinct < 0.6, 0.0, distinct)),
        "all magnitudes": torch.randn(batch) * 10 ** (70 * distinct - 40),
        "NaN here and there": distinct.masked_fill(some, NAN),
        "infinite here and there": (distinct * 9).floor().masked_fill(some, INF).masked_fill(some.roll(1), -INF),
        "one finite": distinct.masked_fill(all_but_one, NAN),
        "none finite": distinct.masked_fill(distinct > -1, NAN),
    }
    problem.in_box = torch.stack(list(kinds.values()))
    problem.rac, problem.mrc = torch.rand(2, len(kinds), batch)
    problem.pred[batch // 3, 0] = NAN
    return problem


def assert_ranks(problem: LossProblem, rho: Tensor, iou: Tensor) -> None:
    truth = literal_rho("batch", problem.in_box, iou.double(), problem.valid)
    torch.testing.assert_close(rho.double(), truth, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 31, 33, 63, 64, 65, 128, 129, 257, 1000, 4096, 5000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rho_of_any_batch(backend: str, batch: int) -> None:
    problem = ranking_problem(batch)
    output = solve_loss(problem, AttBalanceConfig(), backend).output
    assert_ranks(problem, output.rho, output.iou)
    assert (output.rho != 0).any() == (batch > 2)
    assert output.rho[[2, -1]].tolist() == [0, 0]


@pytest.mark.parametrize("layers", [1, 6, 15, 31, 32, 33, 70])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rho_of_any_number_of_layers(backend: str, layers: int) -> None:
    problem = make_loss_problem(layers=layers, batch=100, ties=True, invalid=True)
    problem.in_box[layers // 2, 7] = NAN
    output = solve_loss(problem, AttBalanceConfig(), backend).output
    assert_ranks(problem, output.rho, output.iou)
    assert (output.rho != 0).all()


value = st.one_of(
    st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0, -1.0, 1e-45, -1e-45, NAN, INF, -INF]),
    st.floats(width=32),
)


@pytest.mark.parametrize("backend", NATIVE)
@given(rows=st.lists(st.tuples(value, value, st.integers(0, 5), st.booleans()), max_size=80), keep_all=st.booleans())
def test_rho_of_any_values(backend: str, rows: list[tuple[float, float, int, bool]], keep_all: bool) -> None:
    problem = make_loss_problem(layers=2, batch=len(rows))
    for b, (first, second, shift, valid) in enumerate(rows):
        problem.in_box[:, b] = torch.tensor([first, second])
        problem.target[b] = torch.tensor([0.5, 0.5, 0.5, 0.5])
        problem.pred[b] = torch.tensor([0.5 + 0.125 * shift, 0.5, 0.5, 0.5])
        problem.valid[b] = valid or keep_all
    output = solve_loss(problem, AttBalanceConfig(), backend).output
    assert_ranks(problem, output.rho, output.iou)


@pytest.mark.parametrize("batch", [257, 4096, 5000])
@pytest.mark.parametrize("backend", NATIVE)
def test_all_of_a_large_batch(backend: str, batch: int) -> None:
    """Every output against the reference, and nothing left to what memory held before."""
    problem = make_loss_problem(layers=3, batch=batch, stages=2, ties=True, invalid=True, with_ratio=True)
    problem.in_box[1, ::50] = NAN
    solution = solve_loss(problem, AttBalanceConfig(), backend)
    truth = solve_loss(problem, AttBalanceConfig(), "reference")
    assert max(loss_errors(solution, truth).values()) < 2e-6
    with poisoned_memory():
        again = solve_loss(problem, AttBalanceConfig(), backend)
    assert all(map(same_bits, solution.tensors(), again.tensors()))
