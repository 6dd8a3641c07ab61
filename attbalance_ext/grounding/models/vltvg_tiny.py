"""VLTVG, small enough to learn the built-in benchmark on a laptop: a query that reads and looks in stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attbalance_ext.grounding.models.base import GroundingModel, ObjectAttention
from attbalance_ext.grounding.models.layers import token_padding, trainable
from attbalance_ext.grounding.models.reasoning import Reasoning
from attbalance_ext.grounding.models.text import TextEncoder
from attbalance_ext.grounding.models.vision import ConvEncoder


class VLTVGTiny(GroundingModel):
    """The verification, context and decoder of VLTVG over a small image encoder and a small text encoder.

    Besides its size (4 stages of 6, width 64), it differs from the published model where a small model has to learn
    in minutes:

    * *Frozen vision.* The image encoder is pre-trained without language (``pretrain.py``; the analogue of starting
      from DETR) and does not train afterwards; a linear layer between it and the rest does.
    * *Positions in the values.* A position embedding that starts from 2-D sines is added to the visual tokens. In
      VLTVG only the decoder's keys get positions, and the trainable vision branch puts them into the values.
    * *Text from scratch*: one layer on word embeddings where VLTVG has BERT, and no dropout.
    * *Supervised* are the last 3 of 4 stages (AttBalance: the last 4 of 6).
    """

    image_encoder: ConvEncoder

    def __init__(
        self,
        *,
        vocabulary_size: int,
        image_size: int,
        dim: int = 64,
        heads: int = 4,
        hidden: int = 128,
        visual_layers: int = 1,
        layers: int = 4,
        supervised: Sequence[int] = (1, 2, 3),
        max_words: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.image_encoder = ConvEncoder(
            image_size=image_size, dim=dim, heads=heads, layers=visual_layers, hidden=hidden
        ).requires_grad_(False)
        self.text_encoder = TextEncoder(
            vocabulary_size=vocabulary_size, max_words=max_words, dim=dim, heads=heads, hidden=hidden, dropout=dropout
        )
        self.canvas = image_size
        self.grids = (self.image_encoder.grid,)
        self.max_words = max_words
        self.layers = layers
        self.supervised = tuple(supervised)
        self.visual_projection = nn.Linear(dim, dim)
        self.visual_positions = nn.Parameter(self.image_encoder.positions.clone())
        self.reasoning = Reasoning(
            text_dim=dim,
            dim=dim,
            heads=heads,
            hidden=hidden,
            stages=layers,
            grid=self.image_encoder.grid,
            dropout=dropout,
        )

    @torch.no_grad()
    def prepare(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, N, D): the frozen image encoder, always in evaluation mode."""
        self.image_encoder.eval()
        return self.image_encoder(images)

    def forward(
        self,
        images: Tensor,
        padding: Tensor | None,
        words: Tensor,
        word_padding: Tensor,
        *,
        attention_only: bool = False,
    ) -> Tensor:
        text = self.text_encoder(words, word_padding).transpose(0, 1)
        visual = self.visual_projection(images) + self.visual_positions
        ignored = None if padding is None else token_padding(padding, self.image_encoder.grid)
        return self.reasoning(
            text, word_padding, visual, self.image_encoder.positions[None], ignored, attention_only=attention_only
        )

    def object_attention(self) -> ObjectAttention:
        return self.reasoning.object_attention()

    def parts(self) -> dict[str, list[nn.Parameter]]:
        fusion = [*trainable(self.visual_projection), self.visual_positions, *trainable(self.reasoning)]
        return {"vision": [], "text": trainable(self.text_encoder), "fusion": fusion}

    def train(self, mode: bool = True) -> VLTVGTiny:
        """As usual, except that the frozen image encoder stays in evaluation mode."""
        super().train(mode)
        self.image_encoder.eval()
        return self


def vltvg_tiny(**options: object) -> VLTVGTiny:
    """0.3 million parameters: learns the built-in benchmark on a laptop CPU in a few minutes."""
    return VLTVGTiny(**options)  # type: ignore[arg-type]
