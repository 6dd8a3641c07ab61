"""TransVG (Deng et al., ICCV 2021, arXiv 2104.08541): a REG token reads the box out of text and visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from attbalance_ext.grounding.models.base import GroundingModel, ObjectAttention
from attbalance_ext.grounding.models.layers import MLP, PostNormLayer, trainable, xavier
from attbalance_ext.grounding.models.text_branch import TextBranch
from attbalance_ext.grounding.models.visual_branch import Shared, VisualBranch


class Fusion(nn.Module):
    """TransVG's visual-linguistic fusion (section 3.2) and box head (section 3.3).

    The tokens [REG (1), words (up to ``max_words``), visual (``visual_tokens``)] go through post-norm layers; a
    learned position embedding of every token is added to the queries and keys of every layer. REG's output gives the
    box. In the last layer only REG asks: nobody reads the others' output.
    """

    def __init__(
        self,
        *,
        max_words: int,
        visual_tokens: int,
        text_dim: int,
        visual_dim: int,
        dim: int = 256,
        heads: int = 8,
        hidden: int = 2048,
        layers: int = 6,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.max_words = max_words
        self.visual_tokens = visual_tokens
        self.text_projection = nn.Linear(text_dim, dim)
        self.visual_projection = nn.Linear(visual_dim, dim)
        self.reg = nn.Parameter(torch.randn(dim))
        self.positions = nn.Parameter(torch.randn(1 + max_words + visual_tokens, dim))
        self.layers = nn.ModuleList(PostNormLayer(dim, heads, hidden, dropout) for _ in range(layers))
        xavier(self.layers)
        self.box_head = MLP(dim, dim, 4, depth=3)

    def forward(
        self,
        text: Tensor,
        word_padding: Tensor,
        visual: Tensor,
        visual_padding: Tensor | None,
        *,
        attention_only: bool = False,
    ) -> Tensor:
        """text (B, T, text_dim) with T <= max_words, visual (B, N, visual_dim) -> boxes (B, 4).

        word_padding (B, T), visual_padding (B, N): bool, True = ignore. attention_only: empty, once all have asked.
        """
        batch, length, _ = text.shape  # from here on, tokens are sequence-first
        words = self.text_projection(text).transpose(0, 1)
        image = self.visual_projection(visual).transpose(0, 1)
        tokens = torch.cat([self.reg.expand(1, batch, -1), words, image])
        positions = torch.cat([self.positions[: 1 + length], self.positions[1 + self.max_words :]])[:, None]
        never = word_padding.new_zeros(batch, 1)
        no_image = never.expand(-1, self.visual_tokens) if visual_padding is None else visual_padding
        ignored = torch.cat([never, word_padding, no_image], dim=1)
        *first, last = cast(Sequence[PostNormLayer], self.layers)
        for layer in first:
            tokens = layer(tokens, positions, ignored)
        if attention_only:
            last.show(tokens, positions, ignored)
            return tokens.new_empty(0)
        reg = last(tokens, positions, ignored, queries=1)[0]
        return self.box_head(reg).sigmoid()

    def object_attention(self) -> ObjectAttention:
        """REG's attention to the visual tokens."""
        layers = cast(Sequence[PostNormLayer], self.layers)
        return ObjectAttention([layer.attention for layer in layers], slice(-self.visual_tokens, None))


class TransVG(GroundingModel):
    """TransVG at its published size: BERT-base, a ResNet with DETR's encoder, six fusion layers.

    Parameters, in millions: BERT without pooler 108.89; ResNet-50 23.45 (ResNet-101: 42.39; its batch norms are
    frozen, and constants), 1 x 1 convolution 0.52, DETR's encoder 7.89; projections 0.26, positions 0.11, fusion
    layers 7.89, box head 0.13. TransVG-R50 has 149.2; the 149.7 in the literature counts BERT's pooler (0.59), which
    nothing reads.

    Args:
        depth: of the ResNet, 50 or 101.
        max_words: the paper's is 20, and 40 for RefCOCOg.
        vision_weights: folder or hub id of a DETR checkpoint, see :class:`VisualBranch`; None: random.
        text_weights: folder or hub id of BERT-base, see :class:`TextBranch`; None: random.

    Raises:
        UserError: weights of another design, an image size that is no multiple of 32.
    """

    layers = 6
    supervised = (2, 3, 4, 5)
    image_encoder = None

    def __init__(
        self,
        *,
        vocabulary_size: int,
        depth: int,
        image_size: int = 640,
        max_words: int = 20,
        vision_weights: str | None = None,
        text_weights: str | None = None,
    ) -> None:
        super().__init__()
        self.text_branch = TextBranch(vocabulary_size=vocabulary_size, max_words=max_words, weights=text_weights)
        self.visual_branch = VisualBranch(depth=depth, image_size=image_size, weights=vision_weights)
        height, width = self.visual_branch.grid
        self.canvas = image_size
        self.grids = (self.visual_branch.grid,)
        self.max_words = max_words
        self.fusion = Fusion(
            max_words=max_words,
            visual_tokens=height * width,
            text_dim=self.text_branch.dim,
            visual_dim=self.visual_branch.dim,
            layers=self.layers,
        )

    def share(self, images: Tensor, padding: Tensor | None) -> Shared:
        return self.visual_branch.share(images, padding)

    def forward(
        self,
        images: Tensor | Shared,
        padding: Tensor | None,
        words: Tensor,
        word_padding: Tensor,
        *,
        attention_only: bool = False,
    ) -> Tensor:
        visual = self.visual_branch(images, padding)
        text = self.text_branch(words, word_padding)
        return self.fusion(text, word_padding, visual.tokens, visual.padding, attention_only=attention_only)

    def object_attention(self) -> ObjectAttention:
        return self.fusion.object_attention()

    def parts(self) -> dict[str, list[nn.Parameter]]:
        modules = {"vision": self.visual_branch, "text": self.text_branch, "fusion": self.fusion}
        return {name: trainable(module) for name, module in modules.items()}


def transvg_r50(**options: Any) -> TransVG:
    """TransVG on ResNet-50."""
    return TransVG(depth=50, **options)


def transvg_r101(**options: Any) -> TransVG:
    """TransVG on ResNet-101."""
    return TransVG(depth=101, **options)
