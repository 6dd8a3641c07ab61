"""What one step of training or evaluation needs."""

from __future__ import annotations

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
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(
            images=move(self.images),
            padding=None if self.padding is None else move(self.padding),
            words=move(self.words),
            word_padding=move(self.word_padding),
            boxes=move(self.boxes),
            box_ratio=move(self.box_ratio),
        )
