"""The byte floor, measured: what moving the bytes alone costs on this machine, in the same run as everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Clock

Move = Callable[[Tensor], Any]


class Floor:
    """Reads and writes a case's bytes with the fastest vectorised PyTorch call found for each on this machine.

    A kernel may come out a little below it: nothing says that PyTorch's reduction is the fastest possible read.
    """

    def __init__(self, read: Sequence[Tensor], write: Sequence[Tensor], clock: Clock) -> None:
        self._read = [_integers(t) for t in read]
        self._write = [_integers(t) for t in write]
        self._reader = _fastest([_sum, _amax], self._read, clock)
        self._writer = _fastest([_fill, _zero], self._write, clock)

    def read(self) -> None:
        for tensor in self._read:
            self._reader(tensor)

    def write(self) -> None:
        for tensor in self._write:
            self._writer(tensor)

    def write_fresh(self) -> list[Tensor]:
        """The same bytes into memory newly allocated, as every gradient is: page faults included."""
        fresh = [torch.empty_like(t) for t in self._write]
        for tensor in fresh:
            self._writer(tensor)
        return fresh


def _integers(tensor: Tensor) -> Tensor:
    """The tensor's bytes as 32-bit integers, whose reductions are vectorised whatever the bits mean as numbers."""
    flat = tensor.detach().reshape(-1)
    return flat.view(torch.int32) if flat.numel() * flat.element_size() % 4 == 0 else flat


def _sum(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int64).sum() if tensor.numel() % 2 == 0 else tensor.sum()


def _amax(tensor: Tensor) -> Tensor:
    return tensor.max()


def _fill(tensor: Tensor) -> Tensor:
    return tensor.fill_(1)


def _zero(tensor: Tensor) -> Tensor:
    return tensor.zero_()


def _fastest(moves: Sequence[Move], tensors: Sequence[Tensor], clock: Clock) -> Move:
    def cost(move: Move) -> float:
        def all_tensors() -> None:
            for tensor in tensors:
                move(tensor)

        return min(clock.seconds(lambda: all_tensors) for _ in range(7))

    return min(moves, key=cost)
