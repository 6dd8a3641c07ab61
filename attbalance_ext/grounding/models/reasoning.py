"""What VLTVG (Yang et al., CVPR 2022) puts on its two branches: verify, gather context, and reason in stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attbalance_ext.grounding.models.base import ObjectAttention
from attbalance_ext.grounding.models.layers import MLP, Attention, FeedForward, xavier
from attbalance_ext.grounding.models.relative_attention import RelativeAttention


class Verification(nn.Module):
    """How much each visual token has to do with the sentence (section 3.2).

    A visual token attends to the words; what it reads and the token itself are projected and normalised, and their
    cosine s becomes the score ``scale * exp(-(1 - s)^2 / (2 sigma^2))`` with learned scale and sigma.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, dropout=dropout)
        self.visual_projection = nn.Linear(dim, dim)
        self.language_projection = nn.Linear(dim, dim)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.sigma = nn.Parameter(torch.tensor(0.5))

    def forward(self, visual: Tensor, words: Tensor, word_padding: Tensor) -> Tensor:
        """visual (N, B, D), words (T, B, D), word_padding (B, T) -> (N, B, 1)."""
        read, _ = self.attention(visual, words, words, key_padding_mask=word_padding, need_weights=False)
        read = F.normalize(self.language_projection(read), dim=-1)
        seen = F.normalize(self.visual_projection(visual), dim=-1)
        similarity = (read * seen).sum(-1, keepdim=True)
        return self.scale * torch.exp(-((1 - similarity) ** 2) / (2 * self.sigma**2))


class DiscriminativeEncoder(nn.Module):
    """The visual tokens as the sentence has them (sections 3.2 and 3.3).

    A second attention to the words steers a self-attention with relative positions, which gives each token its
    context; token and context are weighed by the verification score. The paper concatenates the result behind the
    visual tokens it came from; here the two stay apart.
    """

    def __init__(self, dim: int, heads: int, grid: tuple[int, int], dropout: float) -> None:
        super().__init__()
        self.verification = Verification(dim, heads, dropout)
        self.guidance = nn.MultiheadAttention(dim, heads, dropout=dropout)
        self.context = RelativeAttention(dim, heads, grid, dropout)
        self.norm_visual = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim)

    def forward(self, visual: Tensor, visual_padding: Tensor | None, words: Tensor, word_padding: Tensor) -> Tensor:
        """visual (N, B, D), words (T, B, D); paddings (B, N) and (B, T) bool, True = ignore -> (N, B, D)."""
        score = self.verification(visual, words, word_padding)
        guide, _ = self.guidance(visual, words, words, key_padding_mask=word_padding, need_weights=False)
        context = self.context(visual + guide, visual, visual_padding)
        return (self.norm_visual(visual) + self.norm_context(context)) * score


class Stage(nn.Module):
    """One stage of the decoder (section 3.4): the query reads the words, then looks at the image with what it read."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.text_attention = nn.MultiheadAttention(dim, heads, dropout=dropout)
        self.norm_text = nn.LayerNorm(dim)
        self.visual_attention = Attention(dim, heads, dropout=dropout)
        self.norm_visual = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.feedforward = FeedForward(dim, hidden, dropout)

    def read(self, query: Tensor, words: Tensor, word_padding: Tensor) -> Tensor:
        """query (1, B, D), words (T, B, D), word_padding (B, T) bool, True = ignore -> (1, B, D)."""
        read, _ = self.text_attention(query, words, words, key_padding_mask=word_padding, need_weights=False)
        return self.norm_text(read)

    def look(self, query: Tensor, asked: Tensor, keys: Tensor, values: Tensor, padding: Tensor | None) -> Tensor:
        """The query (1, B, D) with what ``asked`` (1, B, D) finds in the visual tokens' keys and values (N, B, D).

        padding (B, N) bool, True = ignore.
        """
        seen, _ = self.visual_attention(asked, keys, values, key_padding_mask=padding, need_weights=False)
        return self.feedforward(self.norm_visual(query + self.dropout(seen)))


class Reasoning(nn.Module):
    """From words and visual tokens to a box in each of several stages.

    The query starts at zero; the same two learned embeddings are added to it in every stage. Each stage has weights
    of its own; all share the last norm and the box head. The supervised attention is the query's to the visual tokens.
    """

    def __init__(
        self, *, text_dim: int, dim: int, heads: int, hidden: int, stages: int, grid: tuple[int, int], dropout: float
    ) -> None:
        super().__init__()
        self.text_projection = nn.Linear(text_dim, dim)
        self.encoder = DiscriminativeEncoder(dim, heads, grid, dropout)
        self.text_query = nn.Parameter(torch.randn(dim))
        self.visual_query = nn.Parameter(torch.randn(dim))
        self.stages = nn.ModuleList(Stage(dim, heads, hidden, dropout) for _ in range(stages))
        self.norm = nn.LayerNorm(dim)
        self.box_head = MLP(dim, dim, 4, depth=3)
        xavier(self.encoder)
        xavier(self.stages)

    def forward(
        self,
        text: Tensor,
        word_padding: Tensor,
        visual: Tensor,
        positions: Tensor,
        visual_padding: Tensor | None,
        *,
        attention_only: bool = False,
    ) -> Tensor:
        """text (B, T, text_dim), visual (B, N, D), positions (B or 1, N, D) -> boxes (S, B, 4) of all S stages.

        word_padding (B, T), visual_padding (B, N): bool, True = ignore. attention_only: empty, once all have asked.
        """
        words = self.text_projection(text).transpose(0, 1)  # from here on, tokens are sequence-first
        values = visual.transpose(0, 1)
        keys = self.encoder(values, visual_padding, words, word_padding) + positions.transpose(0, 1)
        query = torch.zeros_like(words[:1])
        *_, last = stages = cast(Sequence[Stage], list(self.stages))
        outputs = []
        for stage in stages:
            asked = stage.read(query + self.text_query, words, word_padding) + self.visual_query
            if attention_only and stage is last:
                stage.visual_attention(asked, keys, None, key_padding_mask=visual_padding)  # for its hooks alone
                return query.new_empty(0)
            query = stage.look(query, asked, keys, values, visual_padding)
            outputs.append(query[0])
        return self.box_head(self.norm(torch.stack(outputs))).sigmoid()

    def object_attention(self) -> ObjectAttention:
        """The query's attention to the visual tokens, all that it sees there."""
        stages = cast(Sequence[Stage], self.stages)
        return ObjectAttention([stage.visual_attention for stage in stages], slice(None))
