"""What the trainer and the evaluation ask of a grounding model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor, nn

from attbalance_ext import AttentionTap
from attbalance_ext.grounding.models.vision import ConvEncoder

PARTS = ("vision", "text", "fusion")
"""A model's parts, each with a learning rate of its own."""


class ObjectAttention(NamedTuple):
    """Where the object query attends: the first query of every module, the keys ``visual`` of it."""

    modules: list[nn.MultiheadAttention]
    """One for each layer, first to last."""
    visual: slice


class GroundingModel(nn.Module, ABC):
    """An image and a sentence in, one box out, with the object query's attention open to supervision.

    Everything that AttBalance needs to know about a model is said here, so that the trainer repeats none of it: in
    which attention modules the object query looks at the image, where the visual tokens lie among their keys
    (:meth:`object_attention`), which layers are supervised (:attr:`supervised`), how the tokens tile the canvas
    (:attr:`grids`) and which of them are padding (the mask that the attention modules are given).
    """

    canvas: int
    """Side of the square canvas that images are fitted into, in pixels."""

    grids: tuple[tuple[int, int], ...]
    """(H, W) of each grid of visual tokens, in the order of the tokens, row-major."""

    max_words: int
    """Longest sentence, in words (tokens of the tokenizer), that the model takes."""

    layers: int
    """Number of layers in which the object query attends to the visual tokens."""

    image_encoder: ConvEncoder | None
    """The frozen part that is pre-trained without language; None where nothing is."""

    supervised: tuple[int, ...]
    """Indices of the layers that :meth:`make_tap` supervises."""

    def prepare(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> what :meth:`forward` takes: the part of the model that never trains.

        Where images are not augmented, the trainer calls it once per scene and keeps the result.
        """
        return images

    def share(self, images: Tensor, padding: Tensor | None) -> Any:
        """What :meth:`forward` starts with and no training changes at present, for student and teacher to share.

        It ends where a parameter has ``requires_grad``, dropout begins or the sentence comes in. :meth:`forward` takes
        the result in place of ``images``, gives the same bits and the same gradients, and so does that of a momentum
        teacher as long as what does not train has not trained since the teacher was made.
        """
        return images

    @abstractmethod
    def forward(
        self,
        images: Any,
        padding: Tensor | None,
        words: Tensor,
        word_padding: Tensor,
        *,
        attention_only: bool = False,
    ) -> Tensor:
        """Boxes on the canvas, cxcywh in [0, 1]: (B, 4), or (S, B, 4) for S supervised stages, the last one the answer.

        images: from :meth:`prepare`, or what :meth:`share` made of them. padding: (B, S, S) bool, True where the canvas
        shows no image; None: nowhere. words: (B, T) int64. word_padding: (B, T) bool, True = ignore. attention_only:
        stop when the last layer knows its query and keys, call its attention for the hooks alone, and give back an
        empty tensor: all that a momentum teacher needs.
        """

    @abstractmethod
    def object_attention(self) -> ObjectAttention:
        """The attention of the object query to the visual tokens, in every layer."""

    def make_tap(self, *, every_layer: bool = False) -> AttentionTap:
        """A tap on the supervised layers, or on every layer (for analysis), first to last."""
        modules, visual = self.object_attention()
        chosen = range(self.layers) if every_layer else self.supervised
        return AttentionTap([modules[index] for index in chosen], query=0, visual=visual)

    @abstractmethod
    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The trainable parameters by part, each in one of :data:`PARTS`."""
