"""Interleaved timing: every contender once a round, in a rotating order, from the same cache state."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.wash import Wash

# Untimed preparation that hands over what is timed.
Contender = Callable[[], Callable[[], Any]]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender: median, 20 % and 80 % quantiles, fastest, number of samples."""

    median: float
    p20: float
    p80: float
    fastest: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        milliseconds = [1e3 * s for s in seconds]
        if len(milliseconds) == 1:
            milliseconds *= 2  # one sample is all its quantiles
        quintiles = statistics.quantiles(milliseconds, n=5, method="inclusive")
        return cls(statistics.median(milliseconds), quintiles[0], quintiles[3], min(milliseconds), len(seconds))


class Clock(Protocol):
    """How long one call takes, and from which cache state."""

    cache: str  # "cold" or "warm"

    @property
    def washed(self) -> int:
        """Bytes read before each call to make caches cold; 0 where they are warm."""

    def seconds(self, contender: Contender) -> float: ...


class CpuClock:
    """Wall-clock time of one call on the CPU, caches cold or warm.

    Cold: before every call the caches are washed. In a training step the keys come from afar, so cold is the default.
    Warm: the call is made once untimed first, so that what fits in a cache is there.
    """

    def __init__(self, cold: bool = True) -> None:
        self.cache = "cold" if cold else "warm"
        self._wash = Wash(last_level_cache()) if cold else None

    @property
    def washed(self) -> int:
        return 0 if self._wash is None else self._wash.size

    def seconds(self, contender: Contender) -> float:
        if self._wash is None:
            contender()()
        run = contender()
        if self._wash is not None:
            self._wash()
        start = time.perf_counter_ns()
        result = run()
        stop = time.perf_counter_ns()
        del result  # freeing it is not timed: in training the gradients live on
        return (stop - start) / 1e9


def interleave(
    contenders: Mapping[str, Contender],
    clock: Clock,
    *,
    rounds: int,
    warmup: int = 3,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Timing]:
    """Time every contender `rounds` times, after `warmup` untimed rounds.

    One round calls each contender once, so that a slow spell of the machine hits all of them, and the order rotates, so
    that none always runs behind the same neighbour.
    """
    names = list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for turn in range(-warmup, rounds):
            say(f"timing, round {turn + 1} of {rounds}" if turn >= 0 else "warming up")
            first = turn % max(len(names), 1)
            for name in names[first:] + names[:first]:
                seconds = clock.seconds(contenders[name])
                if turn >= 0:
                    samples[name].append(seconds)
    finally:
        gc.enable()
    return {name: Timing.of(seconds) for name, seconds in samples.items()}


def last_level_cache() -> int:
    """Bytes of the CPU's largest cache, 0 where the system does not tell."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        factor = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM") or 0) * factor)
    return max(sizes)
