"""`AttBalanceConfig` and `AttBalanceLoss`: the running rho, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest
import torch
from helpers import BACKENDS, same_bits
from helpers_loss import make_loss_problem, solve_loss

from attbalance_ext import AttBalanceConfig, AttBalanceLoss, AttBalanceOutput, AttentionTerms

EMA = AttBalanceConfig(rho="ema", rho_momentum=0.75)


def step(criterion: AttBalanceLoss, seed: int) -> AttBalanceOutput:
    problem = make_loss_problem(batch=16, seed=seed)
    terms = AttentionTerms(problem.in_box, problem.rac, problem.mrc, problem.valid)
    return criterion(terms, problem.pred, problem.target)


def batch_rho(seed: int) -> torch.Tensor:
    return step(AttBalanceLoss(backend="reference"), seed).rho


@pytest.mark.parametrize("backend", BACKENDS)
def test_running_rho(backend: str) -> None:
    """The first step takes the batch's; then average = momentum * average + (1 - momentum) * batch."""
    criterion = AttBalanceLoss(EMA, backend)
    expected = batch_rho(0)
    for seed in range(4):
        if seed:
            expected = 0.75 * expected + 0.25 * batch_rho(seed)
        torch.testing.assert_close(step(criterion, seed).rho, expected)
        torch.testing.assert_close(criterion.rho_average, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_running_rho_weighs_the_loss(backend: str) -> None:
    criterion = AttBalanceLoss(EMA, backend)
    step(criterion, 0)
    output = step(criterion, 1)
    fixed = AttBalanceConfig(rho=tuple(output.rho.tolist()))
    torch.testing.assert_close(output.loss, solve_loss(make_loss_problem(batch=16, seed=1), fixed, backend).output.loss)


def test_evaluation_reads_the_running_rho_and_leaves_it() -> None:
    criterion = AttBalanceLoss(EMA)
    step(criterion, 0)
    criterion.eval()
    before = criterion.rho_average.clone()
    assert same_bits(step(criterion, 1).rho, before)
    assert same_bits(criterion.rho_average, before)


def test_evaluation_before_training_uses_the_batch() -> None:
    criterion = AttBalanceLoss(EMA).eval()
    assert same_bits(step(criterion, 1).rho, batch_rho(1))
    assert criterion.rho_average.numel() == 0


def test_running_rho_survives_saving() -> None:
    trained, resumed = AttBalanceLoss(EMA), AttBalanceLoss(EMA)
    step(trained, 0)
    resumed.load_state_dict(trained.state_dict())
    assert same_bits(resumed.rho_average, trained.rho_average)
    assert same_bits(step(resumed, 1).rho, step(trained, 1).rho)


def test_running_rho_survives_saving_inside_a_model() -> None:
    trained, resumed = (torch.nn.ModuleDict({"loss": AttBalanceLoss(EMA)}) for _ in range(2))
    step(trained["loss"], 0)
    assert set(trained.state_dict()) == {"loss.rho_average"}
    resumed.load_state_dict(trained.state_dict())
    assert same_bits(resumed["loss"].rho_average, trained["loss"].rho_average)


@pytest.mark.parametrize("rho", ["batch", "global", "off", (0.1, 0.2)])
def test_nothing_else_is_saved(rho: str | tuple[float, ...]) -> None:
    assert not AttBalanceLoss(AttBalanceConfig(rho=rho)).state_dict()


def test_running_rho_of_other_layers_is_refused() -> None:
    criterion = AttBalanceLoss(EMA)
    step(criterion, 0)
    problem = make_loss_problem(layers=3)
    terms = AttentionTerms(problem.in_box, problem.rac, problem.mrc, problem.valid)
    with pytest.raises(ValueError, match="rho_average has 4 layers, the terms have 3"):
        criterion(terms, problem.pred, problem.target)


def test_running_rho_is_not_part_of_the_graph() -> None:
    criterion = AttBalanceLoss(EMA)
    problem = make_loss_problem()
    pred, in_box = problem.pred.requires_grad_(), problem.in_box.requires_grad_()
    criterion(AttentionTerms(in_box, problem.rac, problem.mrc, problem.valid), pred, problem.target)
    assert not criterion.rho_average.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_global_rho_of_a_single_process_is_the_batch_s(backend: str) -> None:
    problem = make_loss_problem(batch=16)
    found = (solve_loss(problem, AttBalanceConfig(rho=rho), backend).tensors() for rho in ("global", "batch"))
    assert all(map(same_bits, *found))


def test_config_is_frozen_and_has_the_paper_s_defaults() -> None:
    config = AttBalanceConfig()
    assert {config.alpha_ar, config.alpha_l1, config.alpha_giou, config.weight_rac, config.weight_mrc} == {1.0}
    assert (config.rho, config.rho_momentum, config.difficulty_from) == ("batch", 0.9, "sum")
    assert (config.detach_difficulty, config.adw, config.odw) == (False, True, True)
    with pytest.raises(FrozenInstanceError):
        config.alpha_ar = 2.0


CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "infinite weight": ({"alpha_l1": math.inf}, "alpha_l1.*finite.*inf"),
    "weight is NaN": ({"weight_rac": math.nan}, "weight_rac.*finite.*nan"),
    "weight is text": ({"alpha_ar": "1"}, "alpha_ar.*finite.*'1'"),
    "unknown rho": ({"rho": "always"}, "rho.*batch, global, ema, off.*'always'"),
    "rho is a list": ({"rho": [0.1]}, r"rho.*tuple.*\[0.1\]"),
    "rho of text": ({"rho": ("a",)}, "rho.*tuple.*'a'"),
    "rho is NaN": ({"rho": (math.nan,)}, "rho.*finite.*nan"),
    "momentum is text": ({"rho_momentum": "0.9"}, "rho_momentum.*'0.9'"),
    "momentum of 1": ({"rho_momentum": 1.0}, r"rho_momentum.*\[0, 1\).*1.0"),
    "negative momentum": ({"rho_momentum": -0.1}, r"rho_momentum.*-0.1"),
    "unknown difficulty": ({"difficulty_from": "max"}, "difficulty_from.*sum, mean, last.*'max'"),
}


@pytest.mark.parametrize(("options", "message"), CONFIGS.values(), ids=CONFIGS)
def test_config_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttBalanceConfig(**options)


def test_config_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="config must be an AttBalanceConfig, got dict"):
        AttBalanceLoss({"alpha_ar": 1.0})


@pytest.mark.parametrize("backend", BACKENDS)
def test_fixed_rho_of_other_length(backend: str) -> None:
    with pytest.raises(ValueError, match="rho has 2 values, the terms have 4 layers"):
        solve_loss(make_loss_problem(), AttBalanceConfig(rho=(0.1, 0.2)), backend)


B = 3
BOXES = torch.rand(B, 4)


def terms(**changes: object) -> AttentionTerms:
    good = {"in_box": torch.rand(2, B), "rac": torch.rand(2, B), "mrc": torch.rand(2, B)}
    return AttentionTerms(**(good | {"valid": torch.ones(B, dtype=torch.bool)} | changes))


CALLS: dict[str, tuple[Callable[[], tuple], dict[str, object], type[Exception], str]] = {
    "terms are a plain tuple": (lambda: ((1, 2, 3, 4), BOXES, BOXES), {}, TypeError, "terms.*AttentionTerms.*tuple"),
    "rac of integers": (
        lambda: (terms(rac=torch.ones(2, B).long()), BOXES, BOXES),
        {},
        TypeError,
        r"terms\.rac.*int64",
    ),
    "rac is a list": (lambda: (terms(rac=[[1.0] * B] * 2), BOXES, BOXES), {}, TypeError, r"terms\.rac.*list"),
    "mrc of other shape": (
        lambda: (terms(mrc=torch.rand(3, B)), BOXES, BOXES),
        {},
        ValueError,
        r"terms\.mrc.*\(L, B\).*\(3, 3\)",
    ),
    "terms of other batch": (
        lambda: (terms(), BOXES[:2], BOXES[:2]),
        {},
        ValueError,
        r"terms\.in_box.*B = 2.*\(2, 3\)",
    ),
    "terms elsewhere": (
        lambda: (terms(in_box=torch.rand(2, B, device="meta")), BOXES, BOXES),
        {},
        ValueError,
        r"terms\.in_box.*cpu.*meta",
    ),
    "valid of floats": (
        lambda: (terms(valid=torch.ones(B)), BOXES, BOXES),
        {},
        ValueError,
        r"terms\.valid.*bool.*float32",
    ),
    "valid is a list": (lambda: (terms(valid=[True] * B), BOXES, BOXES), {}, TypeError, r"terms\.valid.*list"),
    "valid elsewhere": (
        lambda: (terms(valid=torch.ones(B, dtype=torch.bool, device="meta")), BOXES, BOXES),
        {},
        ValueError,
        r"terms\.valid.*cpu.*meta",
    ),
    "boxes of integers": (lambda: (None, BOXES.long(), BOXES), {}, TypeError, "pred_boxes.*int64"),
    "target is a list": (lambda: (None, BOXES, [[0.5] * 4] * B), {}, TypeError, "target_boxes.*list"),
    "target of corners and score": (lambda: (None, BOXES, torch.rand(B, 5)), {}, ValueError, r"target_boxes.*\(B, 4\)"),
    "target of rank 1": (lambda: (None, BOXES, BOXES[0]), {}, ValueError, r"target_boxes.*\(B, 4\).*\(4,\)"),
    "boxes of other batch": (lambda: (None, BOXES[:2], BOXES), {}, ValueError, r"pred_boxes.*\(3, 4\).*\(2, 4\)"),
    "boxes of rank 4": (lambda: (None, BOXES[None, None], BOXES), {}, ValueError, r"pred_boxes.*\(S, B, 4\)"),
    "no stages": (lambda: (None, torch.rand(0, B, 4), BOXES), {}, ValueError, "pred_boxes.*at least one stage"),
    "boxes elsewhere": (lambda: (None, BOXES.to("meta"), BOXES), {}, ValueError, "pred_boxes.*cpu.*meta"),
    "ratio of rank 2": (
        lambda: (None, BOXES, BOXES),
        {"box_ratio": torch.rand(B, 1)},
        ValueError,
        r"box_ratio.*\(3, 1\)",
    ),
    "ratio is a number": (lambda: (None, BOXES, BOXES), {"box_ratio": 0.5}, TypeError, "box_ratio.*float"),
    "ratio elsewhere": (
        lambda: (None, BOXES, BOXES),
        {"box_ratio": torch.rand(B, device="meta")},
        ValueError,
        "box_ratio.*cpu.*meta",
    ),
}


@pytest.mark.parametrize(("arguments", "named", "error", "message"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_refuses(
    backend: str, arguments: Callable[[], tuple], named: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        AttBalanceLoss(backend=backend)(*arguments(), **named)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_calls_are_right_but_for_what_they_test(backend: str) -> None:
    assert AttBalanceLoss(backend=backend)(terms(), BOXES, BOXES, box_ratio=torch.rand(B)).loss.isfinite()
