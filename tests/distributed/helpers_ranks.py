"""Processes of one gloo group on this machine, and what each of them returns."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist


def run_ranks(work: Callable[[int], Any], world: int, folder: Path, limit: float = 120) -> list[Any]:
    """What `work(rank)` returns in each of `world` processes, by rank; it must be what `torch.load` reads safely.

    What a process raises is raised here; more than `limit` seconds fail the test.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.spawn(_run, (work, world, port, str(folder)), nprocs=world, join=False)
    deadline = time.monotonic() + limit
    while not context.join(timeout=5):  # False while one still runs; raises what a process raised
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the processes hang")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _run(rank: int, work: Callable[[int], Any], world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.save(work(rank), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
