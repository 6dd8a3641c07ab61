"""`balanced_loss` in plain PyTorch: rho, rho', difficulty weights, box losses and their mean (AttBalance, section
3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DIFFICULTY_FROM = ("sum", "mean", "last")


class Objective(NamedTuple):
    """loss: scalar, differentiable. samples: (9, B), rows in the order of ``SAMPLE_ROWS``. rho: (L,)."""

    loss: Tensor
    samples: Tensor
    rho: Tensor


SAMPLE_ROWS = ("attention", "box", "rac", "mrc", "l1", "giou", "iou", "adw", "odw")


def balanced_loss(
    in_box: Tensor,
    rac: Tensor,
    mrc: Tensor,
    valid: Tensor,
    pred: Tensor,
    target: Tensor,
    box_ratio: Tensor,
    rho: Tensor | None,
    alpha_ar: float,
    alpha_l1: float,
    alpha_giou: float,
    weight_rac: float,
    weight_mrc: float,
    difficulty_from: int,
    detach_difficulty: bool,
    adw: bool,
    odw: bool,
    plain: bool,
) -> Objective:
    """The objective, differentiable in rac, mrc and pred.

    in_box, rac, mrc: (L, B). valid: (B,) bool. pred: (S, B, 4), target: (B, 4), cxcywh. box_ratio: (B,).
    rho: (L,), or None for Spearman's rho over this batch. difficulty_from: index into ``DIFFICULTY_FROM``.
    plain: the box loss alone, without attention terms and weights.
    """
    iou, giou = box_iou(pred, target)
    l1 = (pred - target).abs().sum(-1).sum(0)
    giou_loss = (1 - giou).sum(0)
    box = alpha_l1 * l1 + alpha_giou * giou_loss
    iou = iou[-1].detach()
    samples = max(box.shape[0], 1)
    if plain:
        one, zero = torch.ones_like(iou), torch.zeros_like(iou)
        rows = (zero, box, zero, zero, l1, giou_loss, iou, one, one)
        return Objective(box.sum() / samples, torch.stack(rows).detach(), rac.new_zeros(0))

    layers = in_box.shape[0]
    if rho is None:
        rho = spearman_rho(in_box.detach(), iou, valid)
    rho_weight = rho - rho.sum() / max(layers, 1) + 1
    weighted_rac = rho_weight[:, None] * rac
    sum_rac, sum_mrc = weighted_rac.sum(0), mrc.sum(0)
    attention = weight_rac * sum_rac + weight_mrc * sum_mrc
    difficulty = attention
    if DIFFICULTY_FROM[difficulty_from] == "mean":
        difficulty = attention / max(layers, 1)
    elif DIFFICULTY_FROM[difficulty_from] == "last" and layers:
        difficulty = weight_rac * weighted_rac[-1] + weight_mrc * mrc[-1]
    if detach_difficulty:
        difficulty = difficulty.detach()
    difficulty = torch.where(valid, difficulty, 0)  # before the sigmoid: 0 * NaN would reach an invalid sample's terms
    one = torch.ones_like(iou)
    actual = torch.where(valid, 0.5 + torch.sigmoid(difficulty), 1) if adw else one
    objective = 0.5 + torch.sigmoid(1 - box_ratio) if odw else one
    loss = (alpha_ar * attention + objective * actual * box).sum() / samples
    rows = (attention, box, sum_rac, sum_mrc, l1, giou_loss, iou, actual, objective)
    return Objective(loss, torch.stack(rows).detach(), rho)


def box_iou(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (Rezatofighi et al. 2019) of (..., B, 4) and (B, 4) cxcywh boxes, (..., B) each.

    IoU is 0 where the union is 0; the hull term is 0 where the hull is 0.
    """
    px1, py1, px2, py2 = _corners(pred)
    tx1, ty1, tx2, ty2 = _corners(target)
    area = _positive(px2 - px1) * _positive(py2 - py1)
    target_area = _positive(tx2 - tx1) * _positive(ty2 - ty1)
    width = _positive(torch.minimum(px2, tx2) - torch.maximum(px1, tx1))
    height = _positive(torch.minimum(py2, ty2) - torch.maximum(py1, ty1))
    inter = width * height
    union = area + target_area - inter
    iou = _ratio(inter, union)
    hull_width = _positive(torch.maximum(px2, tx2) - torch.minimum(px1, tx1))
    hull_height = _positive(torch.maximum(py2, ty2) - torch.minimum(py1, ty1))
    hull = hull_width * hull_height
    return iou, iou - _ratio(hull - union, hull)


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cx, cy, w, h = boxes.unbind(-1)
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2


def _positive(size: Tensor) -> Tensor:
    """The size, 0 where it is negative; its gradient at 0 is 1. That of ``clamp`` depends on PyTorch's version."""
    return torch.where(size < 0, 0, size)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 (and no gradient) where the denominator is 0."""
    zero = denominator == 0
    return torch.where(zero, 0, numerator / torch.where(zero, 1, denominator))


def spearman_rho(x: Tensor, y: Tensor, valid: Tensor) -> Tensor:
    """Spearman's rho of each row of x (L, B) with y (B,), average ranks for ties, (L,) in x's dtype.

    Samples that are not valid or not finite are left out; 0 where undefined (constant, fewer than 2 samples).
    """
    y = y.expand_as(x)
    kept = valid & x.isfinite() & y.isfinite()
    count = kept.sum(-1, keepdim=True)
    mean_rank = (count + 1).double() / 2
    rank_x = torch.where(kept, _average_ranks(x, kept) - mean_rank, 0)
    rank_y = torch.where(kept, _average_ranks(y, kept) - mean_rank, 0)
    covariance = (rank_x * rank_y).sum(-1)
    spread = (rank_x.square().sum(-1) * rank_y.square().sum(-1)).sqrt()
    return _ratio(covariance, spread).to(x.dtype)


def _average_ranks(values: Tensor, kept: Tensor) -> Tensor:
    """Ranks 1.. of the kept entries of each row, ties sharing their mean rank; float64. Others: meaningless."""
    values = torch.where(kept, values, torch.inf).contiguous()  # infinity sorts behind every kept entry
    ordered = values.sort(-1).values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to + 1).double() / 2
