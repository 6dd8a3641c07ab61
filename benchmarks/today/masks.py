"""The box as a mask on the token grid, by way of the image's pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.scenes import CANVAS, Grids


def paint(boxes: Tensor, grids: Grids, canvas: int = CANVAS) -> Tensor:
    """(B, N): 1 inside the box. Painted in whole pixels on the canvas, then resized to each grid, nearest pixel."""
    x, y, w, h = (boxes * canvas).unbind(-1)
    corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1).round().long()
    picture = boxes.new_zeros(len(boxes), 1, canvas, canvas)
    for sample, (x0, y0, x1, y1) in enumerate(corners.tolist()):
        picture[sample, :, y0:y1, x0:x1] = 1
    return torch.cat([F.interpolate(picture, size=grid).flatten(1) for grid in grids], dim=1)
