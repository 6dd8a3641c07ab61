"""What a large copy moves in a second on this machine: the yardstick of every byte count."""

from __future__ import annotations

import statistics

import torch

from benchmarks.timing import Clock, last_level_cache


def copy_bandwidth(clock: Clock, device: torch.device, samples: int = 7) -> float:
    """Bytes a second that a large copy reads and writes, with the threads and the clock of the run.

    Larger than any cache, into memory that is there already: what a kernel can hope for.
    """
    size = 1 << 30 if device.type == "cuda" else max(256 << 20, last_level_cache())
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / statistics.median(clock.seconds(lambda: lambda: target.copy_(source)) for _ in range(samples))
