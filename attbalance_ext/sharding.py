"""What `torch.distributed.fsdp.fully_shard` (FSDP2) makes of modules and parameters, told without importing it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def is_unit(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to this very module, whose class is an `FSDPModule` since."""
    return hasattr(type(module), "set_reshard_after_forward")


def units(model: nn.Module) -> Iterator[Any]:
    """The modules in ``model`` that `fully_shard` was applied to."""
    return filter(is_unit, model.modules())


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only (a `DTensor`)."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; then every process must call this, for the parts are exchanged."""
    whole: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return whole
