"""Spearman's rank correlation on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from attbalance_ext.kernels.balanced_loss import reference


def spearman_rho(x: Tensor, y: Tensor, valid: Tensor | None = None) -> Tensor:
    """Spearman's rho between each row of ``x`` and ``y``, on the device, without host synchronisation or gradient.

    In AttBalance (section 3) ``x`` is the in-box attention of L layers and ``y`` the IoU of the predicted boxes.

    Args:
        x: (L, B) floating.
        y: (B,) floating.
        valid: (B,) bool; False leaves the sample out. Values that are not finite are left out too.

    Returns:
        (L,) float32 (float64 for float64 ``x``). Ties share their average rank, as in ``scipy.stats.spearmanr``;
        0 where rho is undefined: a constant input, or fewer than two samples.
    """
    for name, tensor in (("x", x), ("y", y)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
    if x.dim() != 2:
        raise ValueError(f"x must be (L, B), got shape {tuple(x.shape)}")
    if tuple(y.shape) != (x.shape[1],):
        raise ValueError(f"y must be (B,) = ({x.shape[1]},) like x, got shape {tuple(y.shape)}")
    if y.device != x.device:
        raise ValueError(f"y must be on {x.device} like x, got {y.device}")
    x, y = x.detach(), y.detach()
    if x.dtype.itemsize < 4:
        x = x.float()
    y = y.to(x.dtype)
    if valid is None:
        valid = y.new_ones(y.shape, dtype=torch.bool)
    check_valid(valid, y)
    return reference.spearman_rho(x, y, valid)


def check_valid(valid: Tensor, like: Tensor) -> None:
    """Raise unless ``valid`` is a bool tensor of ``like``'s shape (B,) and device."""
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        raise TypeError(f"valid must be a bool tensor, got {getattr(valid, 'dtype', type(valid).__name__)}")
    if valid.shape != like.shape:
        raise ValueError(f"valid must be (B,) = {tuple(like.shape)}, got shape {tuple(valid.shape)}")
    if valid.device != like.device:
        raise ValueError(f"valid must be on {like.device}, got {valid.device}")
