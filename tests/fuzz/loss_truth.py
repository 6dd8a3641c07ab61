"""What follows from the boxes' losses in the objective, in float64 and written out: rho, weights, sums, gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from helpers_loss import LossProblem
from torch import Tensor

from attbalance_ext import AttBalanceConfig, AttBalanceOutput


@dataclass
class Expected:
    """value, and its size without cancellation."""

    value: Tensor
    natural: Tensor

    def times(self, factor: float) -> Expected:
        return Expected(self.value * factor, self.natural * abs(factor))


@dataclass
class Truth:
    outputs: dict[str, Expected]
    gradients: dict[str, Expected]  # for an incoming gradient of 1


def truth_of(problem: LossProblem, with_terms: bool, config: AttBalanceConfig, boxes: AttBalanceOutput) -> Truth:
    """boxes: of its values only `iou` and `box` are used."""
    box = boxes.box.double()
    batch = len(box)
    share = 1 / max(batch, 1)
    one, zero = torch.ones_like(box), torch.zeros_like(box)
    if not with_terms:
        constant = {name: Expected(value, value) for name, value in {"adw": one, "odw": one}.items()}
        constant |= {name: Expected(zero, zero) for name in ("attention", "rac", "mrc")}
        return Truth({"loss": Expected(box.sum() * share, box.abs().sum() * share), **constant}, {})

    layers = len(problem.rac)
    rac, mrc = problem.rac.double(), problem.mrc.double()
    rho = _rho(problem, config, boxes.iou)
    weight = (rho - rho.sum() / max(layers, 1) + 1)[:, None]
    weight_size = (rho.abs() + rho.abs().sum() / max(layers, 1) + 1)[:, None]
    parts = config.weight_rac * weight * rac + config.weight_mrc * mrc
    part_sizes = abs(config.weight_rac) * weight_size * rac.abs() + abs(config.weight_mrc) * mrc.abs()
    attention, attention_size = parts.sum(0), part_sizes.sum(0)

    decides = torch.ones(layers, 1, dtype=torch.float64)  # how much a layer counts in the difficulty
    if config.difficulty_from == "mean":
        decides /= max(layers, 1)
    elif config.difficulty_from == "last":
        decides[:-1] = 0
    chosen = decides > 0
    difficulty = torch.where(chosen, decides * parts, 0.0).sum(0)
    difficulty_size = torch.where(chosen, decides * part_sizes, 0.0).sum(0)
    weighted = problem.valid & config.adw
    probability = difficulty.sigmoid()
    adw = torch.where(weighted, 0.5 + probability, one)
    adw_size = torch.where(weighted, 2 + difficulty_size / 4, one)
    target = problem.target.to(boxes.iou.dtype)
    ratio = target[:, 2] * target[:, 3] if problem.box_ratio is None else problem.box_ratio
    odw = 0.5 + (1 - ratio.double()).sigmoid() if config.odw else one

    total = config.alpha_ar * attention + odw * adw * box
    total_size = abs(config.alpha_ar) * attention_size + 2 * odw * adw_size * box.abs()
    outputs = {
        "loss": Expected(total.sum() * share, total_size.sum() * share),
        "attention": Expected(attention, attention_size),
        "rac": Expected((weight * rac).sum(0), (weight_size * rac.abs()).sum(0)),
        "mrc": Expected(mrc.sum(0), mrc.abs().sum(0)),
        "adw": Expected(adw, adw_size),
        "odw": Expected(odw, 2 * one),
        "rho": Expected(rho, torch.ones_like(rho)),
    }
    slope, slope_size = zero, zero
    if not config.detach_difficulty:
        slope = torch.where(weighted, odw * box * probability * (1 - probability), zero)
        slope_size = torch.where(weighted, odw * box.abs() * (1 + difficulty_size), zero)
    by_part = share * (config.alpha_ar + torch.where(chosen, decides * slope, 0.0))
    by_part_size = share * (abs(config.alpha_ar) + torch.where(chosen, decides * slope_size, 0.0))
    gradients = {
        "rac": Expected(by_part * config.weight_rac * weight, by_part_size * abs(config.weight_rac) * weight_size),
        "mrc": Expected(by_part * config.weight_mrc, by_part_size * abs(config.weight_mrc)),
    }
    return Truth(outputs, gradients)


def _rho(problem: LossProblem, config: AttBalanceConfig, iou: Tensor) -> Tensor:
    layers = len(problem.rac)
    if isinstance(config.rho, tuple):
        return torch.tensor(config.rho, dtype=torch.float64)
    if config.rho == "off":
        return torch.zeros(layers, dtype=torch.float64)
    in_box = problem.in_box.to(iou.dtype)
    kept = problem.valid & in_box.isfinite() & iou.isfinite()
    a, b = (_centred_ranks(values, kept) for values in (in_box, iou.expand_as(in_box)))
    spread = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where(spread > 0, (a * b).sum(-1) / spread, 0.0)


def _centred_ranks(values: Tensor, kept: Tensor) -> Tensor:
    """(L, B), pair by pair: how many of those kept are smaller, less how many are larger, over 2."""
    differences = (values[:, :, None] - values[:, None]).sign().double()
    return torch.where(kept[:, :, None] & kept[:, None], differences, 0.0).sum(-1) / 2


def box_gradient_size(problem: LossProblem, config: AttBalanceConfig, output: AttBalanceOutput) -> Tensor:
    """(..., B, 1): the size of the gradient by the boxes without cancellation, in the arithmetic's own numbers."""
    dtype = output.iou.dtype
    pred, target = problem.pred.to(dtype), problem.target.to(dtype)
    p, t = ((boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2) for boxes in (pred, target))
    length, target_length = (torch.where(hi < lo, 0, hi - lo) for lo, hi in (p, t))
    shared = (torch.minimum(p[1], t[1]) - torch.maximum(p[0], t[0])).clamp(min=0)
    hull = (torch.maximum(p[1], t[1]) - torch.minimum(p[0], t[0])).clamp(min=0)
    union = length.prod(-1) + target_length.prod(-1) - shared.prod(-1)
    iou, by_union, by_hull = (
        (torch.where(d == 0, 0, n / d))
        for n, d in ((shared.prod(-1), union), (torch.ones_like(union), union), (torch.ones_like(union), hull.prod(-1)))
    )
    grad_all = by_hull + iou * by_union
    by_giou = (
        grad_all[..., None] * length + (by_union + grad_all)[..., None] * shared + 3 * by_hull[..., None] * hull
    ).sum(-1)
    weight = output.odw * output.adw / max(len(target), 1)
    return (weight * (abs(config.alpha_l1) + 4 * abs(config.alpha_giou) * by_giou))[..., None].double()
