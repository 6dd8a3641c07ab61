"""QRNet's multi-scale fusion (arXiv 2203.15442): a feature pyramid, then a way back up modulated by the sentence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attbalance_ext.grounding.models.dynamic_attention import DynamicAttention
from attbalance_ext.grounding.models.layers import token_padding


class QueryModulatedNeck(nn.Module):
    """Feature maps of several levels -> as many maps of ``dim`` channels that have seen each other and the sentence.

    Top-down as in FPN: 1 x 1 convolutions, the coarser level added to the finer one, 3 x 3 convolutions. Bottom-up:
    each level goes through dynamic attention and 2 x 2 mean pooling and is added to the next coarser one.
    """

    def __init__(self, channels: Sequence[int], dim: int, *, sentence_dim: int, rank: int = 30) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(count, dim, 1) for count in channels)
        self.smooth = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in channels)
        self.attention = nn.ModuleList(
            DynamicAttention(dim, sentence_dim=sentence_dim, rank=rank) for _ in channels[1:]
        )
        for convolution in [*self.lateral, *self.smooth]:  # as FPN starts
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)

    def forward(self, levels: Sequence[Tensor], sentence: Tensor) -> list[Tensor]:
        """levels: (B, C, H, W) each, finest first, each half as high and wide as the one before -> (B, dim, H, W)."""
        lateral = [project(level) for project, level in zip(self.lateral, levels, strict=True)]
        for finer in range(len(levels) - 2, -1, -1):
            lateral[finer] = lateral[finer] + F.interpolate(lateral[finer + 1], scale_factor=2.0, mode="nearest")
        pyramid = [smooth(level) for smooth, level in zip(self.smooth, lateral, strict=True)]
        merged = pyramid[:1]
        for attention, level in zip(self.attention, pyramid[1:], strict=True):
            finer_tokens = attention(merged[-1].flatten(2).transpose(1, 2), sentence)
            finer_map = finer_tokens.transpose(1, 2).unflatten(2, merged[-1].shape[2:])
            merged.append(level + F.avg_pool2d(finer_map, 2))
        return merged


class LevelTokens(nn.Module):
    """Feature maps of several levels as one sequence of tokens, each level marked by a learned embedding."""

    def __init__(self, levels: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(levels, dim) * 0.02)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """(B, D, H, W) each -> (B, N, D), level after level, row-major."""
        tokens = [level.flatten(2).transpose(1, 2) for level in levels]
        return torch.cat([some + mark for some, mark in zip(tokens, self.embedding, strict=True)], dim=1)


def level_padding(padding: Tensor | None, grids: Sequence[tuple[int, int]]) -> Tensor | None:
    """(B, S, S) bool padding of pixels -> (B, N) of the tokens of all grids, see :func:`token_padding`."""
    return None if padding is None else torch.cat([token_padding(padding, grid) for grid in grids], dim=1)
