"""What a forward pass keeps alive for its backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.task import Task


def kept_bytes(task: Task) -> int:
    """Bytes of storage that autograd saves in `task.forward`, its leaves' own storage not counted.

    Each storage counts once and whole, because a view keeps all of it alive. dK is not there yet, so this is what a
    step holds beyond its inputs and its gradients.
    """
    own = {_storage(leaf) for leaf in (*task.inputs, *task.extra)}
    kept: dict[int, int] = {}
    alive = []  # an address may be given out again once its storage is freed

    def pack(tensor: Tensor) -> Tensor:
        address = _storage(tensor)
        if address not in own:
            kept[address] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        task.forward()
    return sum(kept.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
