"""QRNet (Ye et al., CVPR 2022, arXiv 2203.15442): TransVG's fusion on an image branch that the sentence modulates."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.models.base import GroundingModel, ObjectAttention
from attbalance_ext.grounding.models.layers import trainable
from attbalance_ext.grounding.models.neck import LevelTokens, QueryModulatedNeck, level_padding
from attbalance_ext.grounding.models.pixels import Normalisation
from attbalance_ext.grounding.models.swin import ModulatedSwin
from attbalance_ext.grounding.models.text_branch import TextBranch
from attbalance_ext.grounding.models.transvg import Fusion


class ModulatedVision(nn.Module):
    """An image and the feature of a sentence -> tokens of two grids, strides 32 and 64 (20 x 20, then 10 x 10, at 640).

    Swin-S and the neck, both modulated by the sentence. The second grid is every other row and column of the first.

    What padding can do: padded pixels are 0 whatever they showed, and padded tokens are never attended to by the
    fusion. But windows, convolutions and the pooling of the channel gates run over the whole canvas, as published,
    so the same image on a larger canvas gives other features.
    """

    dim = 256
    stride = 64
    smallest = 256
    """Where the coarsest map (stride 32) is still larger than a window."""

    def __init__(self, *, image_size: int, sentence_dim: int, weights: str | None = None) -> None:
        super().__init__()
        if image_size % self.stride or image_size < self.smallest:
            wanted = f"a multiple of {self.stride} and at least {self.smallest}"
            raise UserError(f"image_size must be {wanted} for QRNet, got {image_size}")
        cells = image_size // self.stride
        self.grids = ((2 * cells, 2 * cells), (cells, cells))
        self.normalise = Normalisation()
        self.swin = ModulatedSwin(sentence_dim=sentence_dim, weights=weights)
        self.neck = QueryModulatedNeck(self.swin.channels, self.dim, sentence_dim=sentence_dim)
        self.tokens = LevelTokens(len(self.grids), self.dim)

    def forward(self, images: Tensor, padding: Tensor | None, sentence: Tensor) -> Tensor:
        """images (B, 3, S, S) uint8, padding (B, S, S) bool or None, sentence (B, sentence_dim) -> (B, N, 256)."""
        last = self.neck(self.swin(self.normalise(images, padding), sentence), sentence)[-1]
        return self.tokens([last, last[:, :, ::2, ::2]])


class QRNet(GroundingModel):
    """QRNet at its published size: BERT-base, Swin-S, query-aware dynamic attention and neck, six fusion layers.

    BERT's output at the first token is the sentence's feature. Each grid has its own padding.

    Parameters, in millions: BERT without pooler 108.89; Swin-S 48.84, its four dynamic attentions 68.84, the neck's
    three 36.78, the neck's convolutions 2.73; projections 0.26, positions 0.13, fusion layers 7.89, box head 0.13. In
    all 274.5. The literature has about 273; what the neck's convolutions are is a choice here (FPN's, one 3 x 3 each).
    Three eighths of the model predict the dynamic factors, (inputs + 1) x 30 from 768 numbers each.

    Args:
        max_words: longest sentence in tokens, both special ones included.
        vision_weights: folder or hub id of a Swin-S checkpoint (``microsoft/swin-small-patch4-window7-224`` is one),
            see :class:`ModulatedSwin`; None: random.
        text_weights: folder or hub id of BERT-base, see :class:`TextBranch`; None: random.

    Raises:
        UserError: weights of another design, or an image size that is no multiple of 64 or below 256.
    """

    layers = 6
    supervised = (2, 3, 4, 5)
    image_encoder = None

    def __init__(
        self,
        *,
        vocabulary_size: int,
        image_size: int = 640,
        max_words: int = 20,
        vision_weights: str | None = None,
        text_weights: str | None = None,
    ) -> None:
        super().__init__()
        self.text_branch = TextBranch(vocabulary_size=vocabulary_size, max_words=max_words, weights=text_weights)
        self.visual_branch = ModulatedVision(
            image_size=image_size, sentence_dim=self.text_branch.dim, weights=vision_weights
        )
        self.canvas = image_size
        self.grids = self.visual_branch.grids
        self.max_words = max_words
        self.fusion = Fusion(
            max_words=max_words,
            visual_tokens=sum(height * width for height, width in self.grids),
            text_dim=self.text_branch.dim,
            visual_dim=self.visual_branch.dim,
            layers=self.layers,
        )

    def forward(
        self,
        images: Tensor,
        padding: Tensor | None,
        words: Tensor,
        word_padding: Tensor,
        *,
        attention_only: bool = False,
    ) -> Tensor:
        text = self.text_branch(words, word_padding)
        visual = self.visual_branch(images, padding, text[:, 0])
        ignored = level_padding(padding, self.grids)
        return self.fusion(text, word_padding, visual, ignored, attention_only=attention_only)

    def object_attention(self) -> ObjectAttention:
        return self.fusion.object_attention()

    def parts(self) -> dict[str, list[nn.Parameter]]:
        modules = {"vision": self.visual_branch, "text": self.text_branch, "fusion": self.fusion}
        return {name: trainable(module) for name, module in modules.items()}


def qrnet_swin_s(**options: Any) -> QRNet:
    """QRNet on Swin-S."""
    return QRNet(**options)
