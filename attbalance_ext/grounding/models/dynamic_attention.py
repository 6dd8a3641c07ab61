"""Query-aware dynamic attention of QRNet (Ye et al., CVPR 2022, arXiv 2203.15442): a sentence gates visual features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class DynamicLinear(nn.Module):
    """A linear layer whose weight and bias are made from a sentence, as a matrix of rank ``rank`` at most.

    ``[weight; bias] = U(sentence) V``: U (inputs + 1, rank) is predicted linearly from the sentence's feature,
    V (rank, outputs) is a free parameter. Without the factors, predicting the weights would need ``outputs / rank``
    times as many parameters.
    """

    def __init__(self, inputs: int, outputs: int, *, sentence_dim: int, rank: int) -> None:
        super().__init__()
        self.shape = (inputs + 1, rank)
        self.factor = nn.Linear(sentence_dim, (inputs + 1) * rank)
        # For a sentence feature of unit variance, the weights then vary as much as those of a fresh nn.Linear.
        self.basis = nn.Parameter(torch.randn(rank, outputs) / math.sqrt(rank * inputs))

    def forward(self, x: Tensor, sentence: Tensor) -> Tensor:
        """x (B, N, inputs), sentence (B, sentence_dim) -> (B, N, outputs)."""
        made = self.factor(sentence).unflatten(1, self.shape) @ self.basis
        return x @ made[:, :-1] + made[:, -1:]


class DynamicAttention(nn.Module):
    """Multiplies visual features by a gate for each channel, then by a gate for each place; both lie in (0, 1).

    The channel gate comes from the average and the maximum over all places, each through one dynamic MLP of two
    layers (the hidden one ``reduction`` times narrower), summed. The spatial gate is a dynamic linear layer to
    one number per place, on the features after the first gate.
    """

    def __init__(self, dim: int, *, sentence_dim: int, rank: int = 30, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, dim // reduction)
        self.squeeze = DynamicLinear(dim, hidden, sentence_dim=sentence_dim, rank=rank)
        self.excite = DynamicLinear(hidden, dim, sentence_dim=sentence_dim, rank=rank)
        self.place = DynamicLinear(dim, 1, sentence_dim=sentence_dim, rank=rank)

    def channel_gate(self, tokens: Tensor, sentence: Tensor) -> Tensor:
        """tokens (B, N, dim) -> (B, 1, dim)."""
        pooled = torch.stack([tokens.mean(1), tokens.amax(1)], dim=1)
        hidden = self.squeeze(pooled, sentence).relu()
        return self.excite(hidden, sentence).sum(1, keepdim=True).sigmoid()

    def spatial_gate(self, tokens: Tensor, sentence: Tensor) -> Tensor:
        """tokens (B, N, dim) -> (B, N, 1)."""
        return self.place(tokens, sentence).sigmoid()

    def forward(self, tokens: Tensor, sentence: Tensor) -> Tensor:
        """tokens (B, N, dim), sentence (B, sentence_dim) -> (B, N, dim)."""
        tokens = tokens * self.channel_gate(tokens, sentence)
        return tokens * self.spatial_gate(tokens, sentence)
