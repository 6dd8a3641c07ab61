"""A small text encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attbalance_ext.grounding.models.layers import EncoderLayer


class TextEncoder(nn.Module):
    """Word embeddings, learned positions and one transformer layer, from scratch."""

    def __init__(
        self, *, vocabulary_size: int, max_words: int, dim: int, heads: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary_size, dim)
        self.positions = nn.Parameter(torch.randn(max_words, dim) * 0.02)
        self.layer = EncoderLayer(dim, heads, hidden, dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, words: Tensor, padding: Tensor) -> Tensor:
        """(B, T) int64 and (B, T) bool -> (T, B, D)."""
        tokens = self.words(words.T) + self.positions[: words.shape[1], None]
        return self.norm(self.layer(tokens, padding))
