"""Tensors beside memory that cannot be read."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_PROT_NONE = 0


def guarded(tensor: Tensor, side: str = "after") -> Tensor:
    """A copy with the same strides whose last element ("after"), or first ("before"), lies against an inaccessible
    page: to read beyond it ends the process.

    What the strides skip is NaN. With "after", the address is a multiple of 16 only where the size in bytes is.
    """
    if side not in ("after", "before"):
        raise ValueError(f"side must be 'after' or 'before', got {side!r}")
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if not tensor.numel():
        return tensor.clone()
    used = extent * tensor.element_size()
    accessible = -(-used // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, accessible + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    wall, offset = (accessible, accessible - used) if side == "after" else (0, mmap.PAGESIZE)
    if _libc.mprotect(ctypes.c_void_p(address + wall), ctypes.c_size_t(mmap.PAGESIZE), _PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    values = torch.frombuffer(memory, dtype=tensor.dtype, count=extent, offset=offset)  # keeps `memory` alive
    if tensor.is_floating_point():
        values.fill_(torch.nan)
    return values.as_strided(tensor.shape, tensor.stride()).copy_(tensor)
