"""A host's fusion stack as suite `tap` runs it: TransVG's layers, plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[["FusionLayer", Tensor, Tensor, Tensor, Tensor], Tensor]
"""(layer, query, key, value, padding) -> what its attention gives, sequence-first."""


def fused(layer: FusionLayer, query: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> Tensor:
    """The layer's attention as hosts call it: no weights asked for, so PyTorch runs its fused kernels."""
    attended: Tensor = layer.attention(query, key, value, key_padding_mask=padding, need_weights=False)[0]
    return attended


class FusionLayer(nn.Module):
    """Post-norm self-attention and feed-forward; positions are added to queries and keys, never to values.

    In evaluation mode, in which the gate runs it, GELU takes the place of ReLU: where the input of a ReLU is almost 0,
    rounding decides between two gradients, and a float32 gradient that is right is 1e-3 away from the float64 one.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, dropout=dropout)
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, positions: Tensor, padding: Tensor, attend: Attend) -> Tensor:
        key = tokens + positions
        tokens = self.norms[0](tokens + self.dropout(attend(self, key, key, tokens, padding)))
        activation = torch.relu if self.training else F.gelu
        inner = self.dropout(activation(self.inner(tokens)))
        after: Tensor = self.norms[1](tokens + self.dropout(self.outer(inner)))
        return after


class FusionStack(nn.Module):
    """L layers over [REG (1), words (T), visual (N)], sequence-first."""

    def __init__(self, *, layers: int, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusionLayer(width, heads, hidden, dropout) for _ in range(layers))

    def forward(self, tokens: Tensor, positions: Tensor, padding: Tensor, attend: Attend = fused) -> Tensor:
        """tokens (S, B, D), positions (S, 1, D), padding (B, S) bool -> (S, B, D)."""
        for layer in self.layers:
            tokens = layer(tokens, positions, padding, attend)
        return tokens

    def attention_layers(self) -> list[nn.MultiheadAttention]:
        return [layer.attention for layer in cast(Sequence[FusionLayer], self.layers)]
