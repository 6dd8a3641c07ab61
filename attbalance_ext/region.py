"""Boxes on the visual tokens' grids: which tokens count as inside the ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attbalance_ext.kernels.attention_terms import reference
from attbalance_ext.kernels.attention_terms.reference import RULES


@dataclass(frozen=True, eq=False)
class BoxRegion:
    """One box per sample, rasterised on one or several token grids laid end to end.

    The kernels rasterise the box themselves; :meth:`mask` gives the same weights as a tensor.

    Args:
        boxes: (B, 4) cxcywh in [0, 1] of the padded canvas, floating. No gradient. NaN, inverted and outside boxes
            give an empty region, they do not raise.
        grids: ``((H, W), ...)``, row-major, in token order; one pair may stand alone. QRNet: ``((20, 20), (10, 10))``.
        rule: what makes cell j inside. Per axis, in cells, ``lo = (c - w/2) * n`` and ``hi = (c + w/2) * n``:

            * ``"touch"`` (default): its overlap with the box is more than 1e-3 of a cell
            * ``"center"``: ``lo <= j + 1/2 < hi``
            * ``"coverage"``: the overlap itself, a fraction
            * ``"nearest"``: ``lo <= j < hi``

    Raises:
        TypeError: ``boxes`` is not a floating tensor.
        ValueError: ``boxes`` is not (B, 4), a grid is not a pair of positive integers, or the rule is unknown.
    """

    boxes: Tensor
    grids: tuple[tuple[int, int], ...]
    rule: str = "touch"

    def __init__(self, boxes: Tensor, grids: Sequence[tuple[int, int]] | tuple[int, int], rule: str = "touch") -> None:
        if not isinstance(boxes, Tensor):
            raise TypeError(f"boxes must be a tensor (B, 4), got {type(boxes).__name__}")
        if not boxes.is_floating_point():
            raise TypeError(f"boxes must be floating (cxcywh in [0, 1]), got {boxes.dtype}")
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(f"boxes must be (B, 4), got shape {tuple(boxes.shape)}")
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
        object.__setattr__(self, "boxes", boxes)
        object.__setattr__(self, "grids", _as_grids(grids))
        object.__setattr__(self, "rule", rule)

    @property
    def tokens(self) -> int:
        """N, the number of cells of all grids together."""
        return sum(height * width for height, width in self.grids)

    def mask(self) -> Tensor:
        """The weights (B, N) in [0, 1], always float32."""
        return reference.rasterise(self.boxes.detach().to(torch.float32), self.grids, self.rule)


def _as_grids(grids: object) -> tuple[tuple[int, int], ...]:
    if isinstance(grids, (tuple, list)) and len(grids) == 2 and all(isinstance(n, int) for n in grids):
        grids = (grids,)
    pairs = []
    for grid in grids if isinstance(grids, (tuple, list)) else ():
        if not isinstance(grid, (tuple, list)) or len(grid) != 2 or not all(isinstance(n, int) and n > 0 for n in grid):
            raise ValueError(f"grids must hold (H, W) pairs of positive integers, got {grid!r}")
        pairs.append((grid[0], grid[1]))
    if not pairs:
        raise ValueError(f"grids must be ((H, W), ...), got {grids!r}")
    return tuple(pairs)
