"""Pieces shared by the models: transformer layers, sine positions, padding of tokens, an MLP."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


class Attention(nn.MultiheadAttention):
    """Multi-head attention that can be called for its hooks alone: without a value it attends to nothing.

    The last layer of a momentum teacher needs no more than to show a tap its query and keys.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor | None, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        return (query, None) if value is None else super().forward(query, key, value, *args, **options)


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and feed-forward layer, sequence-first like the published models.

    The attention is asked for no weights, so PyTorch runs its fused kernels, in training and in evaluation. (With
    batch-first tensors, evaluation takes a path of its own that materialises the attention and is slower on a CPU.)
    """

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, dropout=dropout)
        self.norm_feedforward = nn.LayerNorm(dim)
        self.feedforward = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, padding: Tensor | None = None, *, queries: int | None = None) -> Tensor:
        """tokens (T, B, D); padding (B, T) bool, True = ignore -> (T, B, D), or only the first ``queries`` tokens."""
        keys = self.norm_attention(tokens)
        tokens, query = (tokens, keys) if queries is None else (tokens[:queries], keys[:queries])
        attended, _ = self.attention(query, keys, keys, key_padding_mask=padding, need_weights=False)
        tokens = tokens + self.dropout(attended)
        return tokens + self.dropout(self.feedforward(self.norm_feedforward(tokens)))

    def show(self, tokens: Tensor, padding: Tensor | None = None) -> None:
        """Call the attention for its hooks alone, arguments as in :meth:`forward`; the first token asks."""
        keys = self.norm_attention(tokens)
        self.attention(keys[:1], keys, None, key_padding_mask=padding)


class PostNormLayer(nn.Module):
    """Post-norm self-attention and feed-forward layer of DETR (Carion et al., ECCV 2020, appendix A.3), sequence-first.

    Positions are added to the queries and keys, never to the values. TransVG's fusion layers are the same. As in
    :class:`EncoderLayer`, the attention is asked for no weights, so that PyTorch runs its fused kernels.
    """

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, dropout=dropout)
        self.norm_attention = nn.LayerNorm(dim)
        self.feedforward = FeedForward(dim, hidden, dropout)

    def forward(
        self, tokens: Tensor, positions: Tensor, padding: Tensor | None = None, *, queries: int | None = None
    ) -> Tensor:
        """tokens (T, B, D), positions (T, B or 1, D), padding (B, T) bool, True = ignore -> (T, B, D).

        queries: only the first ``queries`` tokens attend and come back.
        """
        keys = tokens + positions
        attended, _ = self.attention(keys[:queries], keys, tokens, key_padding_mask=padding, need_weights=False)
        return self.feedforward(self.norm_attention(tokens[:queries] + self.feedforward.dropout(attended)))

    def show(self, tokens: Tensor, positions: Tensor, padding: Tensor | None = None) -> None:
        """Call the attention for its hooks alone, arguments as in :meth:`forward`; the first token asks."""
        keys = tokens + positions
        self.attention(keys[:1], keys, None, key_padding_mask=padding)


class FeedForward(nn.Module):
    """Post-norm: LayerNorm(x + two linear layers of x)."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, hidden)
        self.outer = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.outer(self.dropout(torch.relu(self.inner(x))))))


def sine_positions(height: int, width: int, dim: int) -> Tensor:
    """(height * width, dim) fixed 2-D sine positions, row-major: the first half of the channels says y, the rest x.

    Coordinates are cell centres in [0, 1], so that grids of different sizes speak of the same places.
    """
    quarter = dim // 4
    if 4 * quarter != dim:
        raise ValueError(f"dim must be a multiple of 4, got {dim}")
    frequency = math.pi * 2.0 ** torch.linspace(0.0, math.log2(2 * max(height, width)), quarter)
    y = (torch.arange(height) + 0.5)[:, None] / height * frequency
    x = (torch.arange(width) + 0.5)[:, None] / width * frequency
    rows = torch.cat([y.sin(), y.cos()], dim=1)[:, None].expand(height, width, -1)
    columns = torch.cat([x.sin(), x.cos()], dim=1)[None].expand(height, width, -1)
    return torch.cat([rows, columns], dim=2).reshape(height * width, dim)


def token_padding(padding: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, S, S) bool padding of pixels -> (B, H * W) of the tokens of ``grid``, row-major; H and W divide S.

    A token is padding where all its pixels are, so that every box in the image touches tokens that are none.
    """
    height, width = grid
    return padding.unflatten(2, (width, -1)).all(3).unflatten(1, (height, -1)).all(2).flatten(1)


def mean_of_words(text: Tensor, padding: Tensor) -> Tensor:
    """(T, B, D) -> (1, B, D), padded words left out; 0 for a sentence without words."""
    weight = (~padding).T[..., None].to(text.dtype)
    return (weight * text).sum(0, keepdim=True) / weight.sum(0, keepdim=True).clamp(min=1)


class MLP(nn.Sequential):
    """``depth`` linear layers with ReLU between them."""

    def __init__(self, dim: int, hidden: int, out: int, depth: int) -> None:
        widths = [dim, *[hidden] * (depth - 1), out]
        steps: list[nn.Module] = []
        for source, target in pairwise(widths):
            steps += [nn.Linear(source, target), nn.ReLU()]
        super().__init__(*steps[:-1])


def xavier(module: nn.Module) -> None:
    """DETR's initial weights: Glorot's uniform ones for every matrix; vectors stay as they are."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The module's parameters that get gradients."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
