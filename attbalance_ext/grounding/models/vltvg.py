"""VLTVG (Yang et al., CVPR 2022, arXiv 2205.00272): visual-linguistic verification and iterative reasoning."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attbalance_ext.grounding.models.base import GroundingModel, ObjectAttention
from attbalance_ext.grounding.models.layers import trainable
from attbalance_ext.grounding.models.reasoning import Reasoning
from attbalance_ext.grounding.models.text_branch import TextBranch
from attbalance_ext.grounding.models.visual_branch import Shared, VisualBranch


class VLTVG(GroundingModel):
    """VLTVG at its published size: BERT-base, a ResNet with DETR's encoder, six decoder stages.

    Parameters, in millions: BERT without pooler 108.89; ResNet-50 23.45 (ResNet-101: 42.39; its batch norms are
    frozen, and constants), 1 x 1 convolution 0.52, DETR's encoder 7.89; text projection 0.20, encoder of
    discriminative features 0.99, decoder 9.48, box head 0.13. VLTVG-R50 has 151.6; the 152.2 in the literature counts
    BERT's pooler (0.59), which nothing reads.

    Where the paper leaves a choice: the relative sine terms have 128 channels per axis and a projection of their own,
    without bias; the decoder's two query embeddings are shared by the stages, and the stages by the box head.

    Args:
        depth: of the ResNet, 50 or 101.
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
        max_words: int = 40,
        vision_weights: str | None = None,
        text_weights: str | None = None,
    ) -> None:
        super().__init__()
        self.text_branch = TextBranch(
            vocabulary_size=vocabulary_size, max_words=max_words, weights=text_weights, last_layers=4
        )
        self.visual_branch = VisualBranch(depth=depth, image_size=image_size, weights=vision_weights)
        self.canvas = image_size
        self.grids = (self.visual_branch.grid,)
        self.max_words = max_words
        self.reasoning = Reasoning(
            text_dim=self.text_branch.dim,
            dim=self.visual_branch.dim,
            heads=8,
            hidden=2048,
            stages=self.layers,
            grid=self.visual_branch.grid,
            dropout=0.1,
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
        return self.reasoning(
            text, word_padding, visual.tokens, visual.positions, visual.padding, attention_only=attention_only
        )

    def object_attention(self) -> ObjectAttention:
        return self.reasoning.object_attention()

    def parts(self) -> dict[str, list[nn.Parameter]]:
        modules = {"vision": self.visual_branch, "text": self.text_branch, "fusion": self.reasoning}
        return {name: trainable(module) for name, module in modules.items()}


def vltvg_r50(**options: Any) -> VLTVG:
    """VLTVG on ResNet-50."""
    return VLTVG(depth=50, **options)


def vltvg_r101(**options: Any) -> VLTVG:
    """VLTVG on ResNet-101."""
    return VLTVG(depth=101, **options)
