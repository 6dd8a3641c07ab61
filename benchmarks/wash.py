"""Makes the caches cold: how much has to be read until nothing of the last call is left in them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

_LEAST = 64 << 20
_PROBE = 16 << 20


class Wash:
    """A buffer that is read between two calls (read, not written: dirty lines would be written back during a call).

    Twice the last-level cache is enough on any machine. Where that cache has hundreds of MB, most of it belongs to
    other cores and other tenants, and reading it all would take many times as long as what is measured. So the size is
    found: the smallest buffer after which another one is read no faster than after twice the cache.
    """

    def __init__(self, cache: int) -> None:
        full = torch.zeros(max(_LEAST, 2 * cache) // 8, dtype=torch.int64)
        sizes = [size for size in (_LEAST << step for step in range(12)) if size < full.nbytes]
        probe = torch.zeros(_PROBE // 8, dtype=torch.int64)
        found = smallest_that_washes(sizes, full.nbytes, lambda size: _seconds_after(full[: size // 8], probe))
        self._buffer = full[: found // 8].clone()

    @property
    def size(self) -> int:
        return self._buffer.nbytes

    def __call__(self) -> None:
        self._buffer.sum()


def smallest_that_washes(sizes: list[int], full: int, seconds_after: Callable[[int], float]) -> int:
    """The first of ``sizes`` after which a read takes 95 % of its time after ``full``, or longer; else ``full``.

    Twice that, if ``full`` is not reached: the probe of a busy machine may be wrong by a step.
    """
    if not sizes:
        return full
    cold = seconds_after(full)
    found = next((size for size in sizes if seconds_after(size) >= 0.95 * cold), full)
    return min(2 * found, full)


def _seconds_after(buffer: Tensor, probe: Tensor) -> float:
    """How long reading ``probe``, which was read before ``buffer``, takes after it: the fastest of a few, as only other
    programs make it slower."""
    times = []
    for _ in range(9):
        probe.sum()
        buffer.sum()
        start = time.perf_counter()
        probe.sum()
        times.append(time.perf_counter() - start)
    return min(times)
