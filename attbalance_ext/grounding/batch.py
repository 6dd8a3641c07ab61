"""What one step of training or evaluation needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B samples on one device."""

    images: Tensor
    """What the model's ``prepare`` made of the images."""
    padding: Tensor | None
    """(B, S, S) bool, True where the canvas shows no image; None: nowhere."""
    words: Tensor
    """(B, T) int64."""
    word_padding: Tensor
    """(B, T) bool, True = ignore; T is the longest sentence of this batch."""
    boxes: Tensor
    """(B, 4) cxcywh in [0, 1] of the canvas."""
    box_ratio: Tensor
    """(B,) box area / image area."""

    @property
    def inputs(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """The model's arguments."""
        return self.images, self.padding, self.words, self.word_padding

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """In pages from which a GPU copies while the host goes on; a data loader calls it by this name."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            images=change(self.images),
            padding=None if self.padding is None else change(self.padding),
            words=change(self.words),
            word_padding=change(self.word_padding),
            boxes=change(self.boxes),
            box_ratio=change(self.box_ratio),
        )
