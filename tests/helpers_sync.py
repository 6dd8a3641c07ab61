"""Finds host synchronisation without a GPU: operations that a GPU could not run without the host waiting for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# Their result, or the shape of it, has to be known to the host.
DATA_DEPENDENT = {
    aten._local_scalar_dense,  # .item(), bool(), int(), float()
    aten.equal,
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten.repeat_interleave,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
}


class HostSync(AssertionError):
    """An operation made the host wait for the device."""


class _AtDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in DATA_DEPENDENT:
            raise HostSync(str(func))
        if packet in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            raise HostSync(f"{func} with a mask")
        given = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()}
        made = {t.device.type for t in tree_leaves(result) if isinstance(t, Tensor) and t.dim()}
        if len(given | made) > 1:
            raise HostSync(f"{func} copies between host and device")
        return result


class _AtFunction(TorchFunctionMode):
    """New tensors from Python numbers: on a GPU a copy from pageable memory, for which the host waits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and result.device.type != "cpu":
            raise HostSync(f"{func.__name__} copies from host to device")
        return result


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Raises :class:`HostSync` at operations on tensors whose values the host would have to see.

    On the "meta" device, which stands for a GPU, also at copies to and from the host, and at what never reaches the
    dispatcher (``tolist``, ``numpy``), because there are no values.
    """
    with _AtFunction(), _AtDispatch():
        yield
