"""Invalid samples, values that are not finite, empty batches and layers, in the objective."""

from __future__ import annotations

import pytest
import torch
from helpers import BACKENDS, same_bits
from helpers_loss import assert_solves_loss, literal_loss, make_loss_problem, solve_loss

from attbalance_ext import AttBalanceConfig, AttBalanceLoss, AttentionTerms, BoxRegion, QueryAttention, attention_terms

pytestmark = pytest.mark.parametrize("backend", BACKENDS)

NAN, INF = float("nan"), float("inf")


def test_invalid_samples_keep_their_box_loss(backend: str) -> None:
    """W_adw is 1 there, rho does not see them, and the mean still divides by B."""
    problem = make_loss_problem(invalid=True, batch=6)
    output = solve_loss(problem, AttBalanceConfig(), backend).output
    assert output.adw[[1, 4]].tolist() == [1, 1]
    assert (output.adw[[0, 2, 3, 5]] != 1).all()
    assert (output.box > 0).all()
    per_sample = output.attention + output.odw * output.adw * output.box
    torch.testing.assert_close(output.loss, per_sample.sum() / 6)
    kept = problem.valid
    problem.in_box[:, ~kept] = torch.rand(4, 2)
    assert same_bits(solve_loss(problem, AttBalanceConfig(), backend).output.rho, output.rho)


def test_every_sample_invalid(backend: str) -> None:
    problem = make_loss_problem()
    problem.valid[:] = False
    problem.in_box[:] = problem.rac[:] = 0
    solution = solve_loss(problem, AttBalanceConfig(), backend)
    assert solution.output.rho.tolist() == [0] * 4
    assert solution.output.adw.tolist() == [1] * 6
    assert_solves_loss(solution, literal_loss(problem, AttBalanceConfig()))


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("place", ["rac", "mrc"])
def test_terms_that_are_not_finite(backend: str, place: str, value: float) -> None:
    """The loss tells (GradScaler must see it); the other samples' gradients and rho are as if it were not there."""
    problem = make_loss_problem(layers=3, batch=6)
    problem.in_box[1, 2] = NAN
    getattr(problem, place)[1, 2] = value
    solution = solve_loss(problem, AttBalanceConfig(), backend)
    truth = literal_loss(problem, AttBalanceConfig(), skip={2})
    assert not solution.output.loss.isfinite()
    assert not solution.output.attention[2].isfinite()
    others = [b for b in range(6) if b != 2]
    torch.testing.assert_close(solution.output.rho.double(), truth.output.rho, rtol=1e-6, atol=1e-7)
    for actual, expected in (
        (solution.grad_rac[:, others], truth.grad_rac[:, others]),
        (solution.grad_mrc[:, others], truth.grad_mrc[:, others]),
        (solution.grad_pred[others], truth.grad_pred[others]),
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=1e-7)
    if value != value:
        assert solution.grad_pred[2].isnan().all()


@pytest.mark.parametrize("place", ["rac", "mrc"])
def test_term_of_an_invalid_sample_that_is_nan(backend: str, place: str) -> None:
    """Its difficulty weight is the constant 1: the gradients do not see the NaN."""
    problem = make_loss_problem(layers=3, batch=6, invalid=True)
    clean = solve_loss(problem, AttBalanceConfig(), backend)
    getattr(problem, place)[1, 4] = NAN
    solution = solve_loss(problem, AttBalanceConfig(), backend)
    assert solution.output.loss.isnan()
    assert same_bits(solution.grad_rac, clean.grad_rac)
    assert same_bits(solution.grad_mrc, clean.grad_mrc)
    assert same_bits(solution.grad_pred, clean.grad_pred)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_predicted_box_that_is_not_finite(backend: str, value: float) -> None:
    problem = make_loss_problem(layers=3, batch=6)
    problem.pred[2, 0] = value
    solution = solve_loss(problem, AttBalanceConfig(), backend)
    truth = literal_loss(problem, AttBalanceConfig(), skip={2})
    assert not solution.output.loss.isfinite()
    torch.testing.assert_close(solution.output.rho.double(), truth.output.rho, rtol=1e-6, atol=1e-7)
    others = [b for b in range(6) if b != 2]
    torch.testing.assert_close(solution.grad_pred[others].double(), truth.grad_pred[others], rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(solution.grad_rac[:, others].double(), truth.grad_rac[:, others], rtol=2e-5, atol=1e-7)


def test_nan_score_stays_in_its_sample_through_both_ops(backend: str) -> None:
    """From keys to loss: one bad token of one layer takes nothing from the other samples, rho included."""
    generator = torch.Generator().manual_seed(3)

    def gradients(poison: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
        generator.manual_seed(3)
        key = [torch.randn(6, 16, 4, generator=generator) for _ in range(2)]
        query = [torch.randn(6, 4, generator=generator) for _ in range(2)]
        target = torch.tensor([[0.5, 0.5, 0.5, 0.5]] * 6)
        pred = target + 0.1 * torch.rand(6, 4, generator=generator)
        if poison:
            key[1][2, 5] = NAN
        leaves = [t.requires_grad_() for t in (*query, *key, pred)]
        terms = attention_terms(QueryAttention(query, key, 0.5), BoxRegion(target, (4, 4)), backend=backend)
        in_box = terms.in_box.detach().clone()
        in_box[1, 2] = NAN  # what the clean run must not know either, as rho depends on it
        output = AttBalanceLoss(backend=backend)(terms._replace(in_box=in_box), pred, target)
        return list(torch.autograd.grad(output.loss, leaves)), output.rho

    (clean, clean_rho), (poisoned, rho) = gradients(False), gradients(True)
    assert same_bits(rho, clean_rho)
    assert (rho != 0).any()
    others = [b for b in range(6) if b != 2]
    for a, b in zip(clean, poisoned, strict=True):
        assert same_bits(a[others], b[others])
    assert poisoned[1][2].isnan().all()
    assert poisoned[3][2].isnan().all()


@pytest.mark.parametrize("stages", [None, 3])
@pytest.mark.parametrize("layers", [0, 4])
def test_empty_batch(backend: str, layers: int, stages: int | None) -> None:
    problem = make_loss_problem(layers=layers, batch=0, stages=stages)
    solution = solve_loss(problem, AttBalanceConfig(), backend)
    assert solution.output.loss.item() == 0
    assert solution.output.rho.tolist() == [0] * layers
    assert all(row.shape == (0,) for row in solution.output[1:-1])
    assert solution.grad_rac.shape == (layers, 0)
    assert solution.grad_pred.shape == problem.pred.shape


def test_empty_batch_of_the_plain_loss(backend: str) -> None:
    pred = torch.zeros(0, 4, requires_grad=True)
    output = AttBalanceLoss(backend=backend)(None, pred, torch.zeros(0, 4))
    output.loss.backward()
    assert output.loss.item() == 0
    assert pred.grad.shape == (0, 4)


@pytest.mark.parametrize("difficulty_from", ["sum", "mean", "last"])
def test_no_layers(backend: str, difficulty_from: str) -> None:
    """Nothing to attend to: W_adw = 0.5 + sigmoid(0) = 1."""
    problem = make_loss_problem(layers=0, batch=3)
    config = AttBalanceConfig(difficulty_from=difficulty_from)
    solution = solve_loss(problem, config, backend)
    assert solution.output.adw.tolist() == [1, 1, 1]
    assert solution.output.attention.tolist() == [0, 0, 0]
    torch.testing.assert_close(solution.output.loss, (solution.output.odw * solution.output.box).mean())
    assert_solves_loss(solution, literal_loss(problem, config))


def test_one_sample_has_no_rho(backend: str) -> None:
    solution = solve_loss(make_loss_problem(batch=1), AttBalanceConfig(), backend)
    assert solution.output.rho.tolist() == [0] * 4


def test_large_terms_saturate_without_overflow(backend: str) -> None:
    problem = make_loss_problem(batch=4)
    problem.rac[:, 0] = 1e4
    problem.rac[:, 1] = 0
    problem.mrc[:, 1] = 0
    config = AttBalanceConfig(rho="off")
    solution = solve_loss(problem, config, backend)
    assert solution.output.adw[:2].tolist() == [1.5, 1]
    assert_solves_loss(solution, literal_loss(problem, config))


def test_strongly_negative_difficulty(backend: str) -> None:
    """A negative weight may be asked for; the sigmoid's other end is 0.5."""
    problem = make_loss_problem(batch=4)
    problem.rac[:, 0] = 1e4
    config = AttBalanceConfig(rho="off", weight_rac=-1.0)
    solution = solve_loss(problem, config, backend)
    assert solution.output.adw[0] == 0.5
    assert solution.grad_rac.isfinite().all()


def test_terms_of_one_layer_expanded(backend: str) -> None:
    """Inputs of any strides."""
    problem = make_loss_problem(layers=3, batch=4)
    config = AttBalanceConfig()
    expected = solve_loss(problem, config, backend)
    for name in ("in_box", "rac", "mrc"):
        setattr(problem, name, getattr(problem, name).t().contiguous().t())
    problem.pred = torch.stack([problem.pred, problem.pred], dim=1)[:, 0]
    problem.target = problem.target.t().contiguous().t()
    assert all(map(same_bits, solve_loss(problem, config, backend).tensors(), expected.tensors()))


def test_target_and_ratio_get_no_gradient(backend: str) -> None:
    problem = make_loss_problem(with_ratio=True)
    target, ratio, in_box = (t.requires_grad_() for t in (problem.target, problem.box_ratio, problem.in_box))
    pred = problem.pred.requires_grad_()
    terms = AttentionTerms(in_box, problem.rac, problem.mrc, problem.valid)
    AttBalanceLoss(backend=backend)(terms, pred, target, box_ratio=ratio).loss.backward()
    assert pred.grad is not None
    assert target.grad is None
    assert ratio.grad is None
    assert in_box.grad is None
