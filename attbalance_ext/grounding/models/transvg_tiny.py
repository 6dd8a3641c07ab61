"""TransVG, small enough to learn the built-in benchmark on a laptop: a REG token reads text and visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from attbalance_ext.grounding.models.base import GroundingModel, ObjectAttention
from attbalance_ext.grounding.models.layers import MLP, EncoderLayer, mean_of_words, token_padding
from attbalance_ext.grounding.models.text import TextEncoder
from attbalance_ext.grounding.models.vision import ConvEncoder


class TransVGTiny(GroundingModel):
    """The fusion transformer of TransVG over a small image encoder and a small text encoder.

    Tokens are [REG (1), words (T), visual (N)]; the REG token's output gives the box. The supervised attention
    has REG as its query and the last N tokens as its keys.

    Besides its size, it differs from the published model where a small model has to learn in minutes:

    * *Frozen vision.* The image encoder is pre-trained without language (``pretrain.py``; the analogue of starting
      from DETR) and does not train afterwards; TransVG fine-tunes its ResNet and DETR encoder.
    * *Positions in the values.* The position embedding is added to the fusion's input. TransVG adds it to queries
      and keys only, and learns to copy positions into the visual tokens through its trainable vision branch.
    * *Pre-norm* layers (TransVG: post-norm), which need less warm-up.
    * *A query that has read the sentence.* REG starts as a learned vector plus the mean of the projected words; in
      TransVG it is the learned vector alone, and has to find its words among hundreds of tokens first.
    * *Text from scratch*: one layer on word embeddings where TransVG has BERT.
    * *Image positions*: visual position embeddings start from 2-D sines; all others start random.
    * *Not every layer is supervised.* In the first fusion layer the visual tokens have not met the sentence and REG
      has not met the image; AttBalance supervises the layers after it (the paper: the last 4 of 6).
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
        self.text_projection = nn.Linear(dim, dim)
        self.reg = nn.Parameter(torch.randn(dim) * 0.02)
        self.text_positions = nn.Parameter(torch.randn(max_words, dim) * 0.02)
        self.visual_positions = nn.Parameter(self.image_encoder.positions.clone())
        self.fusion = nn.ModuleList(EncoderLayer(dim, heads, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.box_head = MLP(dim, dim, 4, depth=3)

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
        text = self.text_encoder(words, word_padding)
        ignored = None if padding is None else token_padding(padding, self.image_encoder.grid)
        return self.fuse(text, word_padding, images, ignored, attention_only=attention_only)

    def fuse(
        self,
        text: Tensor,
        word_padding: Tensor,
        visual: Tensor,
        visual_padding: Tensor | None,
        *,
        attention_only: bool = False,
    ) -> Tensor:
        """text (T, B, D), visual (B, N, D) -> boxes (B, 4), or empty; the paddings are (B, T) and (B, N)."""
        batch, count, _ = visual.shape  # from here on, tokens are sequence-first
        words = self.text_projection(text)
        reg = self.reg + mean_of_words(words, word_padding)
        words = words + self.text_positions[: len(words), None]
        image = self.visual_projection(visual.transpose(0, 1)) + self.visual_positions[:, None]
        tokens = torch.cat([reg, words, image])
        never = word_padding.new_zeros(batch, 1)
        no_image = never.expand(-1, count) if visual_padding is None else visual_padding
        ignored = torch.cat([never, word_padding, no_image], dim=1)
        *first, last = cast(Sequence[EncoderLayer], self.fusion)
        for layer in first:
            tokens = layer(tokens, ignored)
        if attention_only:
            last.show(tokens, ignored)
            return tokens.new_empty(0)
        tokens = last(tokens, ignored, queries=1)  # nothing else of the last layer is ever read
        return self.box_head(self.norm(tokens[0])).sigmoid()

    def object_attention(self) -> ObjectAttention:
        layers = cast(Sequence[EncoderLayer], self.fusion)
        return ObjectAttention([layer.attention for layer in layers], slice(-len(self.visual_positions), None))

    def parts(self) -> dict[str, list[nn.Parameter]]:
        text = list(self.text_encoder.parameters())
        known = {id(parameter) for parameter in [*text, *self.image_encoder.parameters()]}
        fusion = [parameter for parameter in self.parameters() if id(parameter) not in known]
        return {"vision": [], "text": text, "fusion": fusion}

    def train(self, mode: bool = True) -> TransVGTiny:
        """As usual, except that the frozen image encoder stays in evaluation mode."""
        super().train(mode)
        self.image_encoder.eval()
        return self


def transvg_tiny(**options: object) -> TransVGTiny:
    """0.3 million parameters: learns the built-in benchmark on a laptop CPU in two minutes."""
    return TransVGTiny(**options)  # type: ignore[arg-type]
