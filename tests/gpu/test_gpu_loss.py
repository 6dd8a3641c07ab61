"""`balanced_loss` on a CUDA device against the literal objective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import same_bits
from helpers_gpu import BACKENDS, DEVICE, loss_at_home, loss_on_device, poison
from helpers_loss import assert_solves_loss, literal_loss, make_loss_problem, solve_loss
from helpers_pairwise import case_id, pairwise

from attbalance_ext import AttBalanceConfig, AttBalanceLoss

pytestmark = pytest.mark.gpu

FACTORS: dict[str, list[Any]] = {
    "layers": [1, 4, 6],
    "batch": [1, 2, 3, 31, 64, 257],
    "stages": [None, 1, 6],
    "with_ratio": [False, True],
    "invalid": [False, True],
    "ties": [False, True],
    "rho": ["batch", "off", "fixed"],
    "difficulty_from": ["sum", "mean", "last"],
    "detach_difficulty": [False, True],
    "adw": [False, True],
    "odw": [False, True],
    "alpha_l1": [0.0, 1.0, 5.0],
}
OF_THE_PROBLEM = ("layers", "batch", "stages", "with_ratio", "invalid", "ties")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", pairwise(FACTORS), ids=case_id)
def test_against_the_equations(case: dict[str, Any], backend: str) -> None:
    problem = make_loss_problem(**{name: case[name] for name in OF_THE_PROBLEM})
    options = {name: value for name, value in case.items() if name not in OF_THE_PROBLEM}
    if options["rho"] == "fixed":
        options["rho"] = tuple(0.8 - 0.3 * layer for layer in range(case["layers"]))
    config = AttBalanceConfig(**options)
    there = loss_on_device(problem)
    poison()
    solution = solve_loss(there, config, backend)
    assert_solves_loss(loss_at_home(solution), literal_loss(problem, config))
    assert all(map(same_bits, solution.tensors(), solve_loss(there, config, backend).tensors()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1000, 1024, 1025, 4096, 5000])
@pytest.mark.parametrize("ties", [False, True])
def test_large_batches(batch: int, ties: bool, backend: str) -> None:
    """Against the CPU kernels, which the other tests hold to the literal objective."""
    problem = make_loss_problem(batch=batch, ties=ties, invalid=True)
    config = AttBalanceConfig()
    found = loss_at_home(solve_loss(loss_on_device(problem), config, backend))
    expected = solve_loss(problem, config, "cpu")
    for actual, wanted in zip(found.tensors(), expected.tensors(), strict=True):
        assert (actual - wanted).norm() <= 2e-5 * wanted.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_box_loss(backend: str) -> None:
    problem = loss_on_device(make_loss_problem(stages=6))
    pred = problem.pred.requires_grad_()
    found = AttBalanceLoss(backend=backend)(None, pred, problem.target)
    expected = AttBalanceLoss(backend="reference")(None, pred, problem.target)
    torch.testing.assert_close(found.loss, expected.loss, rtol=2e-5, atol=0)
    gradients = [torch.autograd.grad(output.loss, pred)[0] for output in (found, expected)]
    assert (gradients[0] - gradients[1]).norm() <= 2e-5 * gradients[1].norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_samples(backend: str) -> None:
    problem = loss_on_device(make_loss_problem(batch=0))
    solution = solve_loss(problem, AttBalanceConfig(), backend)
    assert solution.output.loss.item() == 0
    assert solution.grad_pred.shape == (0, 4)
    assert solution.output.loss.device == DEVICE
