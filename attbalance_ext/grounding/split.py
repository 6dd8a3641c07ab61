"""A data split as batches for one model: from memory, or read and transformed as they are needed."""

from __future__ import annotations

import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from attbalance_ext.grounding.batch import Batch
from attbalance_ext.grounding.data import GroundingDataset
from attbalance_ext.grounding.data.content import content
from attbalance_ext.grounding.data.protocol import Pictures
from attbalance_ext.grounding.data.tokenizers import Tokenizer
from attbalance_ext.grounding.data.transforms import EvalTransform, TrainTransform, View
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.models import GroundingModel

Key = tuple[int, int | None]
"""A sample and the epoch that draws its augmentation; None: none."""


class Split(ABC):
    """Sentences about images, made ready for a model."""

    evaluation_batch: int
    """Samples of a batch where nothing is kept for a backward pass."""

    def __init__(self, pictures: Pictures, tokenizer: Tokenizer, device: torch.device) -> None:
        self.pictures = pictures
        self.tokenizer = tokenizer
        self.device = device

    def __len__(self) -> int:
        return len(self.pictures)

    @cached_property
    def content(self) -> dict[str, Any]:
        """What it holds, as plain values to be compared."""
        return content(self.pictures)

    @abstractmethod
    def batch(self, indices: Tensor) -> Batch:
        """The samples ``indices`` (B,) int64 as they are, on the device, padded to the longest sentence among them."""

    @abstractmethod
    def stream(self, plan: Iterable[tuple[Tensor, int | None]]) -> Iterator[Batch]:
        """A batch for each (indices, epoch) of ``plan``, which may be endless.

        Augmented where the split does that; epoch None: as they are, like :meth:`batch`.
        """

    @abstractmethod
    def view(self, index: int) -> View:
        """A sample as the model sees it, for pictures."""


class PreparedSplit(Split):
    """Everything in memory, and the frozen part of the model done once per scene.

    The model's ``prepare`` runs in chunks of fixed size, so that every run over the same split and weights sees the
    same bits.
    """

    chunk = evaluation_batch = 256

    def __init__(
        self, dataset: GroundingDataset, tokenizer: Tokenizer, model: GroundingModel, device: torch.device
    ) -> None:
        super().__init__(dataset, tokenizer, device)
        self.dataset = dataset
        self.words, self.word_padding = tokenizer.encode(dataset.sentences, model.max_words)
        self.boxes = dataset.boxes.float()
        self.box_ratio = dataset.box_ratio.float()
        self.scene_index = dataset.scene_index
        self.prepared = torch.cat(
            [model.prepare(images.to(device)).cpu() for images in dataset.images.split(self.chunk)]
        )

    def batch(self, indices: Tensor) -> Batch:
        padding = self.word_padding[indices]
        longest = max(int((~padding).sum(1).max()), 1)
        return Batch(
            images=self.prepared[self.scene_index[indices]],
            padding=None,
            words=self.words[indices, :longest],
            word_padding=padding[:, :longest].contiguous(),  # one layout for every length: one graph
            boxes=self.boxes[indices],
            box_ratio=self.box_ratio[indices],
        ).to(self.device)

    def stream(self, plan: Iterable[tuple[Tensor, int | None]]) -> Iterator[Batch]:
        for indices, _ in plan:
            yield self.batch(indices)

    def view(self, index: int) -> View:
        image = self.dataset.images[self.scene_index[index]]
        nowhere = torch.zeros(image.shape[1:], dtype=torch.bool)
        ratio = float(self.box_ratio[index])
        return View(image, nowhere, self.boxes[index], ratio, self.dataset.sentences[index], (1.0, 0.0, 0.0))


class StreamedSplit(Split):
    """Images are read, augmented and fitted into the canvas when a batch needs them, by ``workers`` processes.

    What is drawn at random for a sample follows from (seed, epoch, sample), so neither the number of workers nor an
    interruption changes a batch.
    """

    evaluation_batch = 32

    def __init__(
        self,
        pictures: Pictures,
        tokenizer: Tokenizer,
        model: GroundingModel,
        device: torch.device,
        *,
        augment: TrainTransform | None = None,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__(pictures, tokenizer, device)
        self.views = Views(pictures, model.canvas, augment, seed)
        self.collate = Collate(tokenizer, model.max_words)
        self.prepare = model.prepare
        self.workers = workers

    def batch(self, indices: Tensor) -> Batch:
        return self._finish(self.collate([self.views[index, None] for index in indices.tolist()]))

    def stream(self, plan: Iterable[tuple[Tensor, int | None]]) -> Iterator[Batch]:
        loader = DataLoader(
            self.views,
            batch_sampler=_Keys(plan),
            collate_fn=self.collate,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_process_group,
            generator=torch.Generator(),  # its own: the global one belongs to the training step
        )
        try:
            yield from map(self._finish, loader)
        except UserError as error:
            # From a worker it comes with the worker's traceback in front of what it says.
            raise UserError(str(error).rpartition(f"{UserError.__name__}: ")[2].strip()) from None
        except OSError as error:
            _finish_making(error)
            raise

    def view(self, index: int) -> View:
        return self.views[index, None]

    def _finish(self, batch: Batch) -> Batch:
        batch = batch.to(self.device)
        return replace(batch, images=self.prepare(batch.images))


def _finish_making(error: OSError) -> None:
    """Where PyTorch could not start all workers it leaves an iterator half made, which ends those that did start, and
    first looks for what it has not made yet: it would complain on top of the error."""
    for frame, _ in walk_tb(error.__traceback__):
        made: Any = frame.f_locals.get("self")
        if hasattr(made, "_workers") and not hasattr(made, "_workers_status"):
            made._workers_status = [True] * len(made._workers)


def _leave_process_group(worker: int) -> None:
    """Ctrl-C and torchrun's SIGTERM go to a whole group: the trainer, which needs its workers to end its step, is to
    get them alone. A worker whose trainer is gone ends by itself."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


@dataclass(frozen=True)
class Collate:
    """Samples as one batch, on the CPU, the images as they are. It knows no model: it is sent to worker processes."""

    tokenizer: Tokenizer
    max_words: int

    def __call__(self, views: Sequence[View]) -> Batch:
        words, word_padding = self.tokenizer.encode([view.sentence for view in views], self.max_words)
        return Batch(
            images=torch.stack([view.image for view in views]),
            padding=torch.stack([view.padding for view in views]),
            words=words,
            word_padding=word_padding,
            boxes=torch.stack([view.box for view in views]),
            box_ratio=torch.tensor([view.box_ratio for view in views]),
        )


class Views(Dataset[View]):
    """Samples by (index, epoch)."""

    def __init__(self, pictures: Pictures, canvas: int, augment: TrainTransform | None, seed: int) -> None:
        self.pictures = pictures
        self.plain = EvalTransform(canvas)
        self.augment = augment
        self.seed = seed

    def __getitem__(self, key: Key) -> View:
        index, epoch = key
        transform = self.plain if self.augment is None or epoch is None else self.augment
        return transform(
            self.pictures.pixels(index),
            self.pictures.box(index),
            self.pictures.sentences[index],
            random.Random(f"{self.seed} {epoch} {index}"),
        )


class _Keys:
    """Batches of keys, as DataLoader takes them."""

    def __init__(self, plan: Iterable[tuple[Tensor, int | None]]) -> None:
        self.plan = plan

    def __iter__(self) -> Iterator[list[Key]]:
        for indices, epoch in self.plan:
            yield [(index, epoch) for index in indices.tolist()]
