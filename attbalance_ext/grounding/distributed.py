"""Several processes that train one model, as ``torchrun`` starts them; one process is the simplest case."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from attbalance_ext.grounding.errors import TrainingFailed

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all of the run. Collective methods must be called by every process, in the same order."""

    rank: int = 0
    world: int = 1
    control: Any = None
    """A group on the CPU (gloo) for what the host decides: no device waits for it."""

    @property
    def main(self) -> bool:
        """Whether this process writes the files and speaks to the user."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true in any process. Collective."""
        if self.world == 1:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.control)
        return bool(found)

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each value's mean over the processes, in one message. Collective; the same names and shapes everywhere."""
        if self.world == 1:
            return values
        flat = torch.cat([value.double().reshape(-1) for value in values.values()])
        dist.all_reduce(flat)
        pieces = (flat / self.world).split([value.numel() for value in values.values()])
        return {
            name: piece.reshape(value.shape).to(value.dtype)
            for (name, value), piece in zip(values.items(), pieces, strict=True)
        }

    def gather(self, value: T) -> list[T]:
        """Every process's ``value`` (tensors on the CPU and plain types), in the order of ranks. Collective."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.control)
        return found

    def share(self, indices: Tensor) -> Tensor:
        """This process's part of ``indices`` (n,): consecutive, of equal length where ``world`` divides n."""
        return indices.tensor_split(self.world)[self.rank]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block before the others do: what it leaves on disk they find. Collective."""
        if self.world > 1 and not self.main:
            dist.barrier(group=self.control)
        yield
        if self.world > 1 and self.main:
            dist.barrier(group=self.control)


ALONE = Ranks()


@contextmanager
def ranks_of_this_run() -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started; without it, this process is alone.

    Each process's device "cuda" is the GPU of its local rank. nccl speaks between GPUs, gloo between CPUs.

    Raises:
        TrainingFailed: another process died.
    """
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield ALONE
        return
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    control = dist.new_group(backend="gloo", timeout=timedelta(hours=2))  # the slowest process's validation
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), control)
    except RuntimeError as error:
        if not _lost_a_process(error):
            raise
        raise TrainingFailed(
            "another process of this run is gone; this one cannot go on without it. The last checkpoint is whole: "
            "--resume goes on from there, with any number of processes"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _lost_a_process(error: RuntimeError) -> bool:
    """Whether a collective failed because a peer is gone: gloo has no exception of its own for it."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return "gloo" in text and ("closed" in text or "reset" in text or "timed out" in text or "timeout" in text)
