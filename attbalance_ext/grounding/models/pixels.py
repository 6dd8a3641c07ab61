"""Pixels as networks that were pretrained on ImageNet expect them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of ImageNet's red, green and blue, in [0, 1]."""


class Normalisation(nn.Module):
    """Bytes to float32 by ImageNet's mean and deviation; padding becomes 0 afterwards, whatever it showed."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    def forward(self, images: Tensor, padding: Tensor | None) -> Tensor:
        """images (B, 3, S, S) uint8; padding (B, S, S) bool, True outside the image, or None -> (B, 3, S, S)."""
        pixels = (images.float() / 255 - self.mean) / self.std
        return pixels if padding is None else pixels.masked_fill(padding[:, None], 0)
