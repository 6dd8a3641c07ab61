"""What a call holds: what its forward pass keeps for the backward pass, and how much is allocated at its peak."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own start and end otherwise


def kept_bytes(forward: Callable[[], Any], leaves: Sequence[Tensor]) -> int:
    """Bytes of storage that autograd saves in ``forward``, the leaves' own storage not counted.

    Each storage counts once and whole, because a view keeps all of it alive. dK is not there yet, so this is what a
    step holds beyond its inputs and its gradients.
    """
    own = {_storage(leaf) for leaf in leaves}
    kept: dict[int, int] = {}
    alive = []  # an address may be given out again once its storage is freed

    def pack(tensor: Tensor) -> Tensor:
        address = _storage(tensor)
        if address not in own:
            kept[address] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Memory of tensors at the peak of one call, beyond what is allocated before; results included.

    On a CPU: of what PyTorch's allocator gives out during the call, the most that lives at one time. What a library
    allocates for itself (oneDNN's scratch, NumPy's arrays) is in no such account.
    """
    if device.type == "cuda":
        return _cuda_peak(run)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    del result
    return most_alive(_allocations(recorded))


def most_alive(changes: Iterable[tuple[int, int]]) -> int:
    """The largest sum of living blocks, from (address, size) in order; a negative size is a block's end.

    The end of a block that was there before the record is left out: the profiler would take its size from whatever lay
    at that address in an earlier record.
    """
    alive: dict[int, int] = {}
    total = most = 0
    for address, size in changes:
        if size > 0:
            alive[address] = size
            total += size
            most = max(most, total)
        else:
            total -= alive.pop(address, 0)
    return most


def _allocations(recorded: profile) -> list[tuple[int, int]]:
    """(address, size) of every block given out or taken back on the CPU, in order."""
    found = []
    waiting: list[Any] = list(recorded.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    while waiting:
        event = waiting.pop()
        waiting += event.children
        kind, fields = event.typed
        if kind == _EventType.Allocation and fields.device.type == "cpu":
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    return [(address, size) for _, address, size in sorted(found, key=itemgetter(0))]


def _cuda_peak(run: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
