"""The Triton kernel of `balanced_loss` on CPU tensors, through Triton's interpreter."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace

import pytest
import torch
from helpers import needs_triton, poisoned_memory, same_bits
from helpers_loss import LossProblem, assert_solves_loss, literal_loss, literal_rho, make_loss_problem, solve_loss

from attbalance_ext import AttBalanceConfig, AttBalanceLoss
from tests.emulation import guarded

pytestmark = needs_triton

NAN, INF = float("nan"), float("inf")
CONFIGS = [
    AttBalanceConfig(),
    AttBalanceConfig(alpha_ar=0.7, alpha_l1=5, alpha_giou=2, weight_rac=0.3, weight_mrc=1.7, difficulty_from="mean"),
    AttBalanceConfig(alpha_l1=5, difficulty_from="last"),
    AttBalanceConfig(difficulty_from="last", detach_difficulty=True, odw=False),
    AttBalanceConfig(rho="off", adw=False),
    AttBalanceConfig(rho=(0.5, -0.25, 1.0)),
]
SHAPES = [  # batch, stages, with_ratio, invalid, ties
    (1, None, False, False, False),
    (6, 2, True, True, False),
    (37, 3, True, True, True),
    (70, None, False, True, True),
]


@pytest.mark.parametrize(("config", "shape"), list(itertools.product(CONFIGS, SHAPES)), ids=str)
def test_against_the_equations(config: AttBalanceConfig, shape: tuple) -> None:
    batch, stages, with_ratio, invalid, ties = shape
    problem = make_loss_problem(
        layers=3, batch=batch, stages=stages, with_ratio=with_ratio, invalid=invalid and batch > 1, ties=ties
    )
    with poisoned_memory():
        solution = solve_loss(problem, config, "triton")
    assert_solves_loss(solution, literal_loss(problem, config))
    assert same_bits(solution.output.iou, solve_loss(problem, config, "reference").output.iou)


@pytest.mark.parametrize(("layers", "batch"), [(0, 3), (2, 0), (40, 70)])
def test_any_number_of_layers_and_samples(layers: int, batch: int) -> None:
    problem = make_loss_problem(layers=layers, batch=batch)
    assert_solves_loss(solve_loss(problem, AttBalanceConfig(), "triton"), literal_loss(problem, AttBalanceConfig()))


def test_without_terms() -> None:
    pred, target = torch.rand(2, 5, 4), torch.rand(5, 4)
    results = []
    for backend in ("triton", "reference"):
        boxes = pred.clone().requires_grad_()
        output = AttBalanceLoss(backend=backend)(None, boxes, target)
        results.append([*output, *torch.autograd.grad(output.loss, boxes)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("batch", [2, 3, 31, 64, 65, 130])
def test_rho_against_scipy(batch: int) -> None:
    problem = make_loss_problem(layers=1, batch=batch, invalid=batch > 3, ties=True)
    distinct, few = torch.rand(batch), torch.rand(batch) < 0.1
    problem.in_box = torch.stack(
        [
            distinct,
            (distinct * 5).floor(),
            torch.full((batch,), 0.25),
            torch.where(distinct < 0.3, -0.0, torch.where(distinct < 0.6, 0.0, distinct)),
            (distinct * 9).floor().masked_fill(few, NAN).masked_fill(few.roll(1), -INF),
            distinct.masked_fill(distinct > -1, NAN),
        ]
    )
    problem.rac, problem.mrc = torch.rand(2, 6, batch)
    problem.pred[batch // 3, 0] = NAN
    output = solve_loss(problem, AttBalanceConfig(), "triton").output
    truth = literal_rho("batch", problem.in_box, output.iou.double(), problem.valid)
    torch.testing.assert_close(output.rho.double(), truth, rtol=1e-7, atol=1e-12)
    assert output.rho[[2, -1]].tolist() == [0, 0]


BOXES = {
    "apart": ([0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]),
    "equal": ([0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]),
    "points": ([0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]),
    "touching": ([0.25, 0.5, 0.5, 0.5], [0.75, 0.5, 0.5, 0.5]),
    "inverted": ([0.5, 0.5, -0.2, 0.2], [0.5, 0.5, 0.2, 0.2]),
    "nan": ([NAN, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]),
    "nan target": ([0.5, 0.5, 0.2, 0.2], [0.5, NAN, 0.2, 0.2]),
}


def test_degenerate_boxes_and_ties() -> None:
    """Values and subgradients are those of the C++ kernels."""
    pred, target = (torch.tensor([pair[side] for pair in BOXES.values()]) for side in (0, 1))
    problem = replace(make_loss_problem(layers=2, batch=len(BOXES)), pred=pred, target=target)
    found, expected = (solve_loss(problem, AttBalanceConfig(), name) for name in ("triton", "cpu"))
    for actual, wanted in zip(found.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


def arguments(problem: LossProblem) -> list[object]:
    tensors = [getattr(problem, field.name) for field in fields(problem)]
    return [*tensors, None, 0.7, 5.0, 2.0, 0.3, 1.7, 0, False, True, True, False]


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("batch", [1, 7, 65])
def test_no_input_is_read_beyond_its_ends_and_bits_repeat(batch: int, side: str) -> None:
    problem = make_loss_problem(layers=3, batch=batch, stages=2, with_ratio=True)
    walled = replace(problem, **{f.name: guarded(getattr(problem, f.name), side) for f in fields(problem)})
    op = torch.ops.attbalance_ext.balanced_loss.triton
    assert all(map(same_bits, op(*arguments(problem)), op(*arguments(walled))))


def test_opcheck() -> None:
    problem = make_loss_problem(layers=2, batch=3, stages=1, with_ratio=True)
    torch.library.opcheck(torch.ops.attbalance_ext.balanced_loss.triton, tuple(arguments(problem)))
