"""A data split made ready for a model: sentences encoded, frozen image features computed once per scene."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attbalance_ext.grounding.data import GroundingDataset, Vocabulary
from attbalance_ext.grounding.models import GroundingModel


@dataclass(frozen=True)
class Batch:
    """What one step needs, on the device."""

    images: Tensor
    """What the model's ``prepare`` made of the images."""
    padding: Tensor | None
    """(B, S, S) bool, True where the canvas shows no image; None: nowhere."""
    words: Tensor
    """(B, T) int64."""
    word_padding: Tensor
    """(B, T) bool, True = ignore; T is the longest sentence of this batch."""
    boxes: Tensor
    """(B, 4) cxcywh in [0, 1]."""
    box_ratio: Tensor
    """(B,) box area / image area."""

    @property
    def inputs(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """The model's arguments."""
        return self.images, self.padding, self.words, self.word_padding


class PreparedSplit:
    """Sentences, boxes and prepared images of one split.

    The model's ``prepare`` runs once per scene, in chunks of fixed size, so that every run over the same split
    and weights sees the same bits.
    """

    chunk = 256

    def __init__(
        self, dataset: GroundingDataset, vocabulary: Vocabulary, model: GroundingModel, device: torch.device
    ) -> None:
        self.dataset = dataset
        self.vocabulary = vocabulary
        self.device = device
        self.words, self.word_padding = vocabulary.encode(dataset.sentences, model.max_words)
        self.boxes = dataset.boxes.float()
        self.box_ratio = dataset.box_ratio.float()
        self.scene_index = dataset.scene_index
        self.prepared = torch.cat(
            [model.prepare(images.to(device)).cpu() for images in dataset.images.split(self.chunk)]
        )

    def __len__(self) -> int:
        return len(self.dataset.sentences)

    def batch(self, indices: Tensor) -> Batch:
        """The samples ``indices`` (B,) int64, padded to the longest sentence among them."""
        padding = self.word_padding[indices]
        longest = int((~padding).sum(1).max())
        return Batch(
            images=self.prepared[self.scene_index[indices]].to(self.device),
            padding=None,
            words=self.words[indices, :longest].to(self.device),
            word_padding=padding[:, :longest].to(self.device),
            boxes=self.boxes[indices].to(self.device),
            box_ratio=self.box_ratio[indices].to(self.device),
        )

    def batches(self, batch_size: int) -> list[Tensor]:
        """Indices of the whole split, in order."""
        return list(torch.arange(len(self)).split(batch_size))
