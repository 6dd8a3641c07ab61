"""IoU and generalised IoU as people write them (Rezatofighi et al. 2019), of cxcywh boxes."""

from __future__ import annotations

import torch
from torch import Tensor


def box_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(IoU, generalised IoU) of (B, 4) and (B, 4), sample by sample."""
    a_low, a_high = a[:, :2] - a[:, 2:] / 2, a[:, :2] + a[:, 2:] / 2
    b_low, b_high = b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2
    inter = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0).prod(1)
    union = a[:, 2:].prod(1) + b[:, 2:].prod(1) - inter
    hull = (torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).prod(1)
    iou = inter / union
    return iou, iou - (hull - union) / hull
