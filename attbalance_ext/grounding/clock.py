"""How long a training step takes, without making the device wait."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch


class StepClock:
    """Times steps: with the wall clock on the CPU, with events on a GPU (read only when asked, so no step waits)."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._begin: Any = None
        self._marks: list[tuple[Any, Any]] = []

    def start(self) -> None:
        self._begin = self._now()

    def stop(self) -> None:
        self._marks.append((self._begin, self._now()))

    def median_ms(self) -> float:
        """The median of the steps since the last call, in milliseconds."""
        if self._on_gpu:
            torch.cuda.synchronize()
            times = [begin.elapsed_time(end) for begin, end in self._marks]
        else:
            times = [1e3 * (end - begin) for begin, end in self._marks]
        self._marks.clear()
        return median(times)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
