"""The objective on given terms, with SciPy's rank correlation on the host in the middle of it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.boxes import box_iou


def objective(
    in_box: Tensor,
    rac: Tensor,
    mrc: Tensor | None,
    predicted: Tensor,
    target: Tensor,
    *,
    alpha_l1: float = 1.0,
    alpha_giou: float = 1.0,
    box_ratio: Tensor | None = None,
) -> Tensor:
    """The mean loss. in_box, rac, mrc: (L, B); predicted: (B, 4), or (S, B, 4) for S stages; target: (B, 4)."""
    stages = predicted if predicted.dim() == 3 else predicted[None]
    overlaps = [box_iou(stage, target) for stage in stages]
    l1 = torch.stack([F.l1_loss(stage, target, reduction="none").sum(1) for stage in stages]).sum(0)
    giou = torch.stack([1 - generalised for _, generalised in overlaps]).sum(0)
    box = alpha_l1 * l1 + alpha_giou * giou

    rho = rank_correlation(in_box, overlaps[-1][0])
    attention = ((rho - rho.mean() + 1)[:, None] * rac).sum(0)
    if mrc is not None:
        attention = attention + mrc.sum(0)
    ratio = target[:, 2:].prod(1) if box_ratio is None else box_ratio
    actual = 0.5 + torch.sigmoid(attention)
    objective_weight = 0.5 + torch.sigmoid(1 - ratio)
    return (attention + actual * objective_weight * box).mean()


def rank_correlation(in_box: Tensor, iou: Tensor) -> Tensor:
    """Spearman's rho of each layer's in-box attention (L, B) with the IoU (B,), by SciPy; (L,)."""
    from scipy.stats import spearmanr  # optional: without it today's way is unavailable

    overlap = iou.detach().cpu().numpy()
    rho = [spearmanr(layer.detach().cpu().numpy(), overlap).statistic for layer in in_box]
    return torch.from_numpy(np.nan_to_num(rho)).to(in_box)  # NaN where a side is constant
