"""Measuring on a CUDA device: time, launches, host time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import Contender

_AHEAD = 10_000_000  # cycles, 5 to 6 ms: longer than most contenders of `op` and `tail` need to queue their work


class CudaClock:
    """Time of one call on the device, between two events, L2 cache cold or warm.

    The device is kept busy while the call is queued, so that what is timed is the device's work and not Python's; a
    contender that waits for the device in the middle of its work pays for it. Cold: a buffer four times the L2 cache
    is read first. Warm: the call is made once untimed first.
    """

    def __init__(self, cold: bool = True) -> None:
        self.cache = "cold" if cold else "warm"
        level2 = torch.cuda.get_device_properties().L2_cache_size
        self._wash = torch.zeros(level2, dtype=torch.int32, device="cuda") if cold else None

    @property
    def washed(self) -> int:
        return 0 if self._wash is None else self._wash.nbytes

    def seconds(self, contender: Contender) -> float:
        if self._wash is None:
            contender()()
        run = contender()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_AHEAD)
        if self._wash is not None:
            self._wash.sum()
        start.record()
        result = run()
        stop.record()
        torch.cuda.synchronize()
        del result
        return start.elapsed_time(stop) / 1e3


def launches(run: Callable[[], Any]) -> int:
    """Kernels, copies and fills that one call puts on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events())


def host_milliseconds(contender: Contender, samples: int = 20) -> float:
    """Median time until a call returns while the device is busy with something else."""
    times = []
    for _ in range(samples):
        run = contender()
        torch.cuda.synchronize()
        torch.cuda._sleep(_AHEAD)
        start = time.perf_counter()
        result = run()
        times.append(1e3 * (time.perf_counter() - start))
        del result
    torch.cuda.synchronize()
    return statistics.median(times)
