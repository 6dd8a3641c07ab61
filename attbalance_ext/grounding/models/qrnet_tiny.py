"""QRNet, small enough to learn the built-in benchmark on a laptop: the sentence gates what the image branch sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.models.dynamic_attention import DynamicAttention
from attbalance_ext.grounding.models.layers import EncoderLayer, mean_of_words, sine_positions
from attbalance_ext.grounding.models.neck import LevelTokens, QueryModulatedNeck, level_padding
from attbalance_ext.grounding.models.transvg_tiny import TransVGTiny
from attbalance_ext.grounding.models.vision import ConvEncoder

RANK = 8


class ModulatedStages(nn.Module):
    """Two stages on an image's tokens, each ending with query-aware dynamic attention, patch merging between them."""

    def __init__(self, grid: tuple[int, int], dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.grids = (grid, (grid[0] // 2, grid[1] // 2))
        self.channels = (dim, 2 * dim)
        self.fine = DynamicAttention(dim, sentence_dim=dim, rank=RANK)
        self.merging = nn.Sequential(nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False))
        self.layer = EncoderLayer(2 * dim, heads, 2 * hidden)
        self.coarse = DynamicAttention(2 * dim, sentence_dim=dim, rank=RANK)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)

    def forward(self, tokens: Tensor, sentence: Tensor) -> list[Tensor]:
        """tokens (B, N, D), sentence (B, D) -> maps (B, D, H, W) and (B, 2 D, H / 2, W / 2)."""
        fine = self.fine(tokens, sentence)
        height, width = self.grids[1]
        patches = fine.unflatten(1, (height, 2, width, 2)).transpose(2, 3)
        merged = self.merging(patches.flatten(3, 5).flatten(1, 2))
        coarse = self.coarse(self.layer(merged.transpose(0, 1)).transpose(0, 1), sentence)
        return [
            norm(level).transpose(1, 2).unflatten(2, grid)
            for norm, level, grid in zip(self.norms, (fine, coarse), self.grids, strict=True)
        ]


class QRNetTiny(TransVGTiny):
    """The fusion of the small TransVG on visual tokens that the sentence has modulated, on two grids.

    A frozen image encoder, the same as the small TransVG's, gives the tokens at the bottom, which alone can be
    prepared once per image. Then, as in QRNet: dynamic attention, patch merging, a transformer layer, dynamic
    attention; the neck over both levels; their tokens (8 x 8, then 4 x 4 for 64 pixels) with scale embeddings.

    Besides its size (dynamic weights of rank 8, for 30), it differs from the published model in what the small TransVG
    says, and in this:

    * *Two modulated stages* where QRNet has four, on a frozen bottom where QRNet trains all of Swin.
    * *Global attention* in the second stage: one of Swin's windows would hold all of its 16 tokens.
    * *A neck that starts by passing on*: its 3 x 3 convolutions begin as the identity, so that what a frozen token says
      of its cell is not mixed with eight neighbours first.
    * *No extra level*: the two grids are the neck's two levels, where QRNet subsamples its last one.
    * *The sentence's feature* is the mean of its words' features; there is no first token as BERT's.

    Raises:
        UserError: an image size that is no multiple of 16.
    """

    def __init__(self, *, image_size: int, dim: int = 64, heads: int = 4, hidden: int = 128, **options: Any) -> None:
        if image_size <= 0 or image_size % (2 * ConvEncoder.stride):
            raise UserError(f"image_size must be a multiple of {2 * ConvEncoder.stride} for QRNet, got {image_size}")
        super().__init__(image_size=image_size, dim=dim, heads=heads, hidden=hidden, **options)
        self.stages = ModulatedStages(self.image_encoder.grid, dim, heads, hidden)
        self.neck = QueryModulatedNeck(self.stages.channels, dim, sentence_dim=dim, rank=RANK)
        for parameter in self.neck.smooth.parameters():
            if parameter.dim() > 1:
                nn.init.dirac_(parameter)
        self.tokens = LevelTokens(len(self.stages.grids), dim)
        self.grids = self.stages.grids
        self.visual_positions = nn.Parameter(torch.cat([sine_positions(*grid, dim) for grid in self.grids]))

    def forward(
        self,
        images: Tensor,
        padding: Tensor | None,
        words: Tensor,
        word_padding: Tensor,
        *,
        attention_only: bool = False,
    ) -> Tensor:
        ignored = level_padding(padding, self.grids)
        if (
            ignored is not None
        ):  # convolutions and pooling run over the whole canvas: let padding be 0, as QRNet's pixels are
            images = images.masked_fill(ignored[:, : images.shape[1], None], 0)
        text = self.text_encoder(words, word_padding)
        sentence = mean_of_words(text, word_padding)[0]
        visual = self.tokens(self.neck(self.stages(images, sentence), sentence))
        return self.fuse(text, word_padding, visual, ignored, attention_only=attention_only)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        vision = [*self.stages.parameters(), *self.neck.parameters(), *self.tokens.parameters()]
        modulated = {id(parameter) for parameter in vision}
        parts = super().parts()
        fusion = [parameter for parameter in parts["fusion"] if id(parameter) not in modulated]
        return {**parts, "vision": vision, "fusion": fusion}


def qrnet_tiny(**options: Any) -> QRNetTiny:
    """0.9 million parameters, 0.2 of them frozen."""
    return QRNetTiny(**options)
