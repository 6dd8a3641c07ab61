"""The order of the training data: a function of the seed and the step, with nothing to save or restore."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


class DataOrder:
    """Batches of a new permutation per epoch; the remainder of an epoch that fills no batch is left out."""

    def __init__(self, samples: int, batch_size: int, seed: int) -> None:
        self.samples = samples
        self.batch_size = min(batch_size, samples)
        self.seed = seed
        self.steps_per_epoch = samples // self.batch_size
        self._permuted = lru_cache(maxsize=1)(self._permutation)

    def indices(self, step: int) -> Tensor:
        """(batch_size,) int64: the samples of a step, counted from 0."""
        position = step % self.steps_per_epoch
        return self._permuted(self.epoch(step))[position * self.batch_size :][: self.batch_size]

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to, counted from 0."""
        return step // self.steps_per_epoch

    def _permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.samples, generator=generator)
