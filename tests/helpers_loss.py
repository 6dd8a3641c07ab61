"""Problems for `balanced_loss`, and the objective written out sample by sample in float64, with SciPy for rho."""

from __future__ import annotations

import warnings
from collections.abc import Container
from dataclasses import dataclass

import numpy as np
import scipy.stats
import torch
from helpers import BOUND
from torch import Tensor

from attbalance_ext import AttBalanceConfig, AttBalanceLoss, AttBalanceOutput, AttentionTerms


@dataclass
class LossProblem:
    """in_box, rac, mrc: (L, B). valid: (B,). pred: (B, 4) or (S, B, 4), target: (B, 4). box_ratio: (B,) or None."""

    in_box: Tensor
    rac: Tensor
    mrc: Tensor
    valid: Tensor
    pred: Tensor
    target: Tensor
    box_ratio: Tensor | None


@dataclass
class LossSolution:
    """The output, and the gradients for an incoming gradient of 1."""

    output: AttBalanceOutput
    grad_rac: Tensor
    grad_mrc: Tensor
    grad_pred: Tensor

    def tensors(self) -> list[Tensor]:
        return [*self.output, self.grad_rac, self.grad_mrc, self.grad_pred]


def make_loss_problem(
    *,
    layers: int = 4,
    batch: int = 6,
    stages: int | None = None,
    dtype: torch.dtype = torch.float32,
    with_ratio: bool = False,
    invalid: bool = False,
    ties: bool = False,
    seed: int = 0,
) -> LossProblem:
    """Random boxes, some of which do not overlap; terms of any size. ties: values of A_in and IoU repeat."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    in_box = uniform(layers, batch)
    target = torch.cat([0.2 + 0.6 * uniform(batch, 2), 0.1 + 0.3 * uniform(batch, 2)], dim=1)
    offset = 0.3 * (uniform(stages or 1, batch, 4) - 0.5)
    if ties:
        in_box = (in_box * 3).ceil() / 3
        target[::2] = target[0].clone()
        offset[:, ::2] = offset[:, :1].clone()
    valid = torch.ones(batch, dtype=torch.bool)
    rac, mrc = -2 * in_box.log(), 2 * uniform(layers, batch)
    if invalid:
        valid[1::3] = False
        in_box[:, 1::3] = rac[:, 1::3] = 0
    pred = target + offset
    pred[..., 2:].abs_()
    return LossProblem(
        in_box.to(dtype),
        rac.to(dtype),
        mrc.to(dtype),
        valid,
        (pred if stages else pred[0]).to(dtype),
        target.to(dtype),
        uniform(batch).to(dtype) if with_ratio else None,
    )


def solve_loss(problem: LossProblem, config: AttBalanceConfig, backend: str) -> LossSolution:
    rac, mrc, pred = (t.detach().clone().requires_grad_() for t in (problem.rac, problem.mrc, problem.pred))
    terms = AttentionTerms(problem.in_box, rac, mrc, problem.valid)
    output = AttBalanceLoss(config, backend)(terms, pred, problem.target, box_ratio=problem.box_ratio)
    gradients = torch.autograd.grad(output.loss, [rac, mrc, pred])
    return LossSolution(AttBalanceOutput(*(value.detach() for value in output)), *gradients)


def literal_loss(problem: LossProblem, config: AttBalanceConfig, skip: Container[int] = ()) -> LossSolution:
    """The objective of section 3 of the paper, one sample at a time; `skip`: samples left out of the sum (not of B)."""
    rac, mrc, pred = (t.detach().double().requires_grad_() for t in (problem.rac, problem.mrc, problem.pred))
    target, in_box = problem.target.double(), problem.in_box.double()
    layers, batch = rac.shape
    stages = pred if pred.dim() == 3 else pred[None]
    rows: dict[str, list[Tensor]] = {name: [] for name in AttBalanceOutput._fields[1:-1]}
    for b in range(batch):
        l1 = giou_loss = torch.zeros((), dtype=torch.float64)
        for stage in stages:
            l1 = l1 + (stage[b] - target[b]).abs().sum()
            iou, giou = literal_iou(stage[b], target[b])
            giou_loss = giou_loss + 1 - giou
        rows["l1"].append(l1)
        rows["giou"].append(giou_loss)
        rows["iou"].append(iou)
        rows["box"].append(config.alpha_l1 * l1 + config.alpha_giou * giou_loss)
    iou = torch.stack([*rows["iou"], torch.zeros((), dtype=torch.float64)]).detach()[:batch]
    rho = literal_rho(config.rho, in_box, iou, problem.valid)
    loss = torch.zeros((), dtype=torch.float64)
    for b in range(batch):
        rho_weight = [rho[layer] - rho.mean() + 1 for layer in range(layers)]
        weighted = [rho_weight[layer] * rac[layer, b] for layer in range(layers)]
        sum_rac, sum_mrc = (sum(parts, torch.zeros((), dtype=torch.float64)) for parts in (weighted, mrc[:, b]))
        attention = config.weight_rac * sum_rac + config.weight_mrc * sum_mrc
        difficulty = attention
        if config.difficulty_from == "mean" and layers:
            difficulty = attention / layers
        elif config.difficulty_from == "last" and layers:
            difficulty = config.weight_rac * weighted[-1] + config.weight_mrc * mrc[-1, b]
        if config.detach_difficulty:
            difficulty = difficulty.detach()
        one = torch.ones((), dtype=torch.float64)
        adw = 0.5 + 1 / (1 + torch.exp(-difficulty)) if config.adw and problem.valid[b] else one
        ratio = target[b, 2] * target[b, 3] if problem.box_ratio is None else problem.box_ratio[b].double()
        odw = 0.5 + 1 / (1 + torch.exp(ratio - 1)) if config.odw else one
        if b not in skip:
            loss = loss + (config.alpha_ar * attention + odw * adw * rows["box"][b]) / batch
        for name, value in (("attention", attention), ("rac", sum_rac), ("mrc", sum_mrc), ("adw", adw), ("odw", odw)):
            rows[name].append(value)
    gradients = torch.autograd.grad(loss, [rac, mrc, pred], materialize_grads=True) if batch else (rac, mrc, pred)
    columns = {
        name: torch.stack(values).detach() if values else torch.zeros(0, dtype=torch.float64)
        for name, values in rows.items()
    }
    return LossSolution(AttBalanceOutput(loss.detach(), **columns, rho=rho), *(g.detach() for g in gradients))


def literal_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of two cxcywh boxes with sides >= 0 and a union > 0."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = (
        (box[0] - box[2] / 2, box[1] - box[3] / 2, box[0] + box[2] / 2, box[1] + box[3] / 2) for box in (a, b)
    )
    width = torch.clamp(torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1), min=0)
    height = torch.clamp(torch.minimum(ay2, by2) - torch.maximum(ay1, by1), min=0)
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - width * height
    hull = (torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)) * (torch.maximum(ay2, by2) - torch.minimum(ay1, by1))
    iou = width * height / union
    return iou, iou - (hull - union) / hull


def literal_rho(source: str | tuple[float, ...], in_box: Tensor, iou: Tensor, valid: Tensor) -> Tensor:
    if isinstance(source, tuple):
        return torch.tensor(source, dtype=torch.float64)
    rho = torch.zeros(len(in_box), dtype=torch.float64)
    if source == "off":
        return rho
    for layer, row in enumerate(in_box):
        kept = (valid & row.isfinite() & iou.isfinite()).numpy()
        if kept.sum() > 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = scipy.stats.spearmanr(row.numpy()[kept], iou.numpy()[kept]).statistic
            rho[layer] = 0 if np.isnan(found) else float(found)
    return rho


def loss_errors(solution: LossSolution, truth: LossSolution) -> dict[str, float]:
    """Norm-relative error of every output and gradient."""
    names = [*AttBalanceOutput._fields, "grad_rac", "grad_mrc", "grad_pred"]
    found = {}
    for name, actual, expected in zip(names, solution.tensors(), truth.tensors(), strict=True):
        assert actual.shape == expected.shape, name
        assert torch.equal(actual.isnan(), expected.isnan()), name
        actual, expected = actual.double().nan_to_num(), expected.nan_to_num()
        error = (actual - expected).norm().item()
        found[name] = 0.0 if error == 0 else error / max(expected.norm().item(), 1e-30)
    return found


def assert_solves_loss(solution: LossSolution, truth: LossSolution) -> None:
    """Ten times closer than the promised 2e-4 in float32."""
    bound = BOUND[solution.output.loss.dtype]
    wrong = {name: error for name, error in loss_errors(solution, truth).items() if not error <= bound}
    assert not wrong, f"relative errors above {bound}: {wrong}"
