"""The objective and its gradients against the literal computation, over a pairwise covering set of all options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import BACKENDS, DOUBLE
from helpers_loss import assert_solves_loss, literal_loss, make_loss_problem, solve_loss
from helpers_pairwise import case_id, pairwise

from attbalance_ext import (
    AttBalanceConfig,
    AttBalanceLoss,
    AttentionTerms,
    BoxRegion,
    QueryAttention,
    attention_terms,
)

FACTORS: dict[str, list[Any]] = {
    "dtype": [torch.float32, torch.float64],
    "layers": [1, 4, 6],
    "batch": [1, 2, 3, 8, 64],
    "stages": [None, 1, 3],
    "ratio": ["target", "given"],
    "samples": ["valid", "invalid"],
    "values": ["distinct", "ties"],
    "rho": ["batch", "off", "fixed", "global"],
    "difficulty_from": ["sum", "mean", "last"],
    "detach_difficulty": [False, True],
    "adw": [False, True],
    "odw": [False, True],
    "weights": ["ones", "unequal", "no attention", "no box"],
}
WEIGHTS = {
    "ones": {},
    "unequal": {"alpha_ar": 0.7, "alpha_l1": 5.0, "alpha_giou": 2.0, "weight_rac": 0.3, "weight_mrc": 1.7},
    "no attention": {"alpha_ar": 0.0, "weight_mrc": 0.0},
    "no box": {"alpha_l1": 0.0, "alpha_giou": 0.0},
}
CASES = pairwise(FACTORS)
SINGLE_CASES = pairwise(FACTORS | {"dtype": [torch.float32]})
RUNS = [(case, backend) for backend in BACKENDS for case in (CASES if backend in DOUBLE else SINGLE_CASES)]


@pytest.mark.parametrize(
    ("case", "backend"), RUNS, ids=lambda value: value if isinstance(value, str) else case_id(value)
)
def test_against_the_equations(case: dict[str, Any], backend: str) -> None:
    problem = make_loss_problem(
        layers=case["layers"],
        batch=case["batch"],
        stages=case["stages"],
        dtype=case["dtype"],
        with_ratio=case["ratio"] == "given",
        invalid=case["samples"] == "invalid",
        ties=case["values"] == "ties",
    )
    rho = tuple(0.8 - 0.3 * layer for layer in range(case["layers"])) if case["rho"] == "fixed" else case["rho"]
    config = AttBalanceConfig(
        rho=rho,
        difficulty_from=case["difficulty_from"],
        detach_difficulty=case["detach_difficulty"],
        adw=case["adw"],
        odw=case["odw"],
        **WEIGHTS[case["weights"]],
    )
    solution = solve_loss(problem, config, backend)
    assert all(value.dtype == case["dtype"] for value in solution.tensors())
    assert_solves_loss(solution, literal_loss(problem, config))


@pytest.mark.parametrize("rho", ["batch", "off"])
@pytest.mark.parametrize("difficulty_from", ["sum", "mean", "last"])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("adw", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_difficulty_options_in_full(backend: str, rho: str, difficulty_from: str, detach: bool, adw: bool) -> None:
    """Small terms, so that W_adw is away from its ceiling and its gradient counts."""
    problem = make_loss_problem(invalid=True)
    problem.rac *= 0.1
    problem.mrc *= 0.1
    config = AttBalanceConfig(rho=rho, difficulty_from=difficulty_from, detach_difficulty=detach, adw=adw)
    assert_solves_loss(solve_loss(problem, config, backend), literal_loss(problem, config))


def test_the_options_matter() -> None:
    """Each option changes the loss or its gradient, else the tests above could not tell."""
    problem = make_loss_problem(with_ratio=True)
    problem.rac *= 0.1
    default = literal_loss(problem, AttBalanceConfig())
    for change in (
        {"rho": "off"},
        {"rho": (0.1, 0.2, 0.3, 0.4)},
        {"difficulty_from": "mean"},
        {"difficulty_from": "last"},
        {"detach_difficulty": True},
        {"adw": False},
        {"odw": False},
        {"alpha_ar": 2.0},
        {"alpha_l1": 2.0},
        {"alpha_giou": 2.0},
        {"weight_rac": 2.0},
        {"weight_mrc": 2.0},
    ):
        other = literal_loss(problem, AttBalanceConfig(**change))
        moved = sum((a - b).norm() for a, b in zip(default.tensors(), other.tensors(), strict=True))
        assert moved > 1e-3, change


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stages", [None, 1, 6])
def test_plain_box_loss(backend: str, stages: int | None) -> None:
    """terms=None: the mean of alpha_l1 L1 + alpha_giou (1 - GIoU), without weights."""
    problem = make_loss_problem(stages=stages, layers=1)
    config = AttBalanceConfig(alpha_l1=5.0, alpha_giou=2.0)
    truth = literal_loss(problem, AttBalanceConfig(alpha_ar=0, alpha_l1=5.0, alpha_giou=2.0, adw=False, odw=False))
    pred = problem.pred.clone().requires_grad_()
    output = AttBalanceLoss(config, backend)(None, pred, problem.target)
    (gradient,) = torch.autograd.grad(output.loss, pred)
    for name in ("loss", "box", "l1", "giou", "iou", "adw", "odw"):
        torch.testing.assert_close(getattr(output, name).double(), getattr(truth.output, name), rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(gradient.double(), truth.grad_pred, rtol=2e-5, atol=1e-7)
    for name in ("attention", "rac", "mrc"):
        assert getattr(output, name).tolist() == [0] * 6
    assert output.rho.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_from_keys_to_loss(backend: str) -> None:
    """Both ops together: the gradient of the whole objective for queries and keys, by a literal computation."""
    layers, batch, tokens, width = 2, 5, 16, 4
    query = [torch.randn(batch, width, requires_grad=True) for _ in range(layers)]
    key = [torch.randn(batch, tokens, width, requires_grad=True) for _ in range(layers)]
    teacher = [torch.randn(batch, tokens, width) for _ in range(layers)]
    target = torch.cat([0.3 + 0.4 * torch.rand(batch, 2), 0.3 + 0.2 * torch.rand(batch, 2)], dim=1)
    pred = (target + 0.05 * torch.randn(batch, 4)).requires_grad_()
    student = QueryAttention(query, key, 0.4)
    region = BoxRegion(target, (4, 4))
    terms = attention_terms(student, region, teacher=QueryAttention(query, teacher, 0.4), backend=backend)
    output = AttBalanceLoss(backend=backend)(terms, pred, target)
    found = torch.autograd.grad(output.loss, [*query, *key, pred])

    leaves = [t.detach().double().requires_grad_() for t in (*query, *key)]
    rac, mrc, in_box = [], [], []
    for layer in range(layers):
        p, t = (
            (0.4 * torch.einsum("bd,bnd->bn", leaves[layer] if student else q.detach(), keys)).softmax(-1)
            for student, q, keys in (
                (True, query[layer], leaves[layers + layer]),
                (False, query[layer].double(), teacher[layer].double()),
            )
        )
        inside = (p * region.mask()).sum(-1)
        in_box.append(inside)
        rac.append(-2 * inside.log())
        mrc.append((t * (t.log() - p.log())).sum(-1))
    problem = make_loss_problem(layers=layers, batch=batch)
    problem.in_box, problem.rac, problem.mrc = (torch.stack(x).detach() for x in (in_box, rac, mrc))
    problem.pred, problem.target = pred.detach(), target
    truth = literal_loss(problem, AttBalanceConfig())
    expected = torch.autograd.grad([torch.stack(rac), torch.stack(mrc)], leaves, [truth.grad_rac, truth.grad_mrc])
    torch.testing.assert_close(output.loss.double(), truth.output.loss, rtol=2e-5, atol=0)
    for actual, wanted in zip(found, [*expected, truth.grad_pred], strict=True):
        assert (actual - wanted).norm() <= 2e-5 * wanted.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_defaults_are_the_paper_s(backend: str) -> None:
    """One sample by hand: L_ar = RAC + MRC (one layer: rho' = 1), both weights, L1 and GIoU."""
    terms = AttentionTerms(torch.tensor([[0.5]]), torch.tensor([[0.4]]), torch.tensor([[0.2]]), torch.tensor([True]))
    pred, target = torch.tensor([[0.5, 0.5, 0.5, 0.5]]), torch.tensor([[0.5, 0.5, 0.25, 0.5]])
    output = AttBalanceLoss(backend=backend)(terms, pred, target)
    sigmoid = torch.sigmoid(torch.tensor([0.6, 0.875]))
    expected = 0.6 + (0.5 + sigmoid[0]) * (0.5 + sigmoid[1]) * (0.25 + 0.5)
    torch.testing.assert_close(output.loss, expected)
    assert output.iou.tolist() == [0.5]
    assert output.giou.tolist() == [0.5]
    assert output.l1.tolist() == [0.25]
