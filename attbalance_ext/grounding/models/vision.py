"""A small convolutional image encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attbalance_ext.grounding.models.layers import EncoderLayer, sine_positions


class ConvEncoder(nn.Module):
    """Image to visual tokens: a convolutional stem of stride 8, 2-D positions, and transformer layers."""

    stride = 8
    positions: Tensor

    def __init__(self, *, image_size: int, dim: int, heads: int, layers: int, hidden: int) -> None:
        super().__init__()
        if image_size % self.stride:
            raise ValueError(f"image_size must be a multiple of {self.stride}, got {image_size}")
        cells = image_size // self.stride
        self.grid = (cells, cells)
        self.dim = dim
        half = dim // 2
        self.stem = nn.Sequential(
            _convolution(3, half, stride=2),
            _convolution(half, dim, stride=2),
            _convolution(dim, dim, stride=2),
            _Residual(dim),
        )
        self.register_buffer("positions", sine_positions(cells, cells, dim), persistent=False)
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, N, D)."""
        pixels = images.float() / 127.5 - 1.0
        tokens = self.stem(pixels).flatten(2).permute(2, 0, 1) + self.positions[:, None]
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm(tokens).transpose(0, 1)


def _convolution(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class _Residual(nn.Module):
    """x + two 3 x 3 convolutions of x."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first = _convolution(dim, dim, stride=1)
        self.second = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(self.first(x)))
