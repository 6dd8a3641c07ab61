"""What the trainer and the evaluation ask of a grounding model."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from attbalance_ext import AttentionTap
from attbalance_ext.grounding.models.vision import ConvEncoder


class GroundingModel(nn.Module, ABC):
    """An image and a sentence in, one box out, with the object query's attention open to supervision.

    Everything that AttBalance needs to know about a model is said here, so that the trainer repeats none of it:
    which attention modules are supervised and where the visual tokens lie (:meth:`make_tap`) and how those
    tokens tile the image (:attr:`grids`).
    """

    grids: tuple[tuple[int, int], ...]
    """(H, W) of each grid of visual tokens, in the order of the tokens, row-major."""

    max_words: int
    """Longest sentence, in words, that the model takes."""

    layers: int
    """Number of layers in which the object query attends to the visual tokens."""

    image_encoder: ConvEncoder | None
    """The frozen part that is pre-trained without language; None where nothing is."""

    supervised: tuple[int, ...]
    """Indices of the layers that :meth:`make_tap` supervises."""

    @abstractmethod
    def prepare(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> what :meth:`forward` takes: the part of the model that never trains.

        The trainer calls it once per scene and keeps the result. A model with nothing frozen returns its images.
        """

    @abstractmethod
    def forward(self, prepared: Tensor, words: Tensor, word_padding: Tensor) -> Tensor:
        """Boxes in [0, 1], cxcywh: (B, 4), or (S, B, 4) for S supervised stages, the last one the answer.

        prepared: from :meth:`prepare`. words: (B, T) int64. word_padding: (B, T) bool, True = ignore.
        """

    @abstractmethod
    def make_tap(self, *, every_layer: bool = False) -> AttentionTap:
        """A tap on the supervised layers, or on every layer (for analysis), first to last."""
