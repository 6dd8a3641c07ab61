"""The ops in forked processes, in DataLoader's workers and in several threads at once: the same bits as alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from helpers import same_bits, threads
from helpers_attention import make_problem, solve
from helpers_loss import make_loss_problem, solve_loss
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from attbalance_ext import AttBalanceConfig

PATIENCE = 60  # seconds, for what takes a fraction of one


def results(seed: int = 0) -> list[Tensor]:
    """Both ops and their gradients, on shapes that are worth several threads."""
    return solver(seed)()


def solver(seed: int = 0) -> Callable[[], list[Tensor]]:
    """The same, with everything made that PyTorch itself would use several threads for."""
    problem = make_problem(batch=20, tokens=401, width=64, seed=seed)
    loss_problem, config = make_loss_problem(batch=2000, seed=seed), AttBalanceConfig()
    return lambda: [*solve(problem, "cpu").tensors(), *solve_loss(loss_problem, config, "cpu").tensors()]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(same_bits, found, expected))


def in_a_child(action: Callable[[], list[Tensor]], expected: list[Tensor]) -> int | None:
    """The exit status of a forked process, 0 where it got what is expected; None where it hangs."""
    child = os.fork()
    if child == 0:
        try:
            found = action()
            torch.set_num_threads(1)  # comparing is PyTorch's, which would hang
            os._exit(0 if equal(found, expected) else 1)
        finally:
            os._exit(2)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def test_a_process_forked_after_the_parent_used_its_threads() -> None:
    """GNU's OpenMP waits for ever in such a process, for threads that stayed in the parent; PyTorch's own ops do."""
    with threads(4):
        solve_again = solver()
        expected = solve_again()
        assert in_a_child(solve_again, expected) == 0
        assert equal(solve_again(), expected)


class Samples(Dataset):
    """What an input pipeline would do that uses the ops, say to look for hard samples."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> list[Tensor]:
        return results(index)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_data_loader(context: str) -> None:
    with threads(2):
        expected = [results(seed) for seed in range(3)]
        loader = DataLoader(
            Samples(), batch_size=None, num_workers=2, multiprocessing_context=context, timeout=PATIENCE
        )
        found = list(loader)
    assert len(found) == 3
    assert all(map(equal, found, expected))


@pytest.mark.parametrize("pytorch_threads", [1, 2])
def test_eight_threads_at_once(pytorch_threads: int) -> None:
    expected = [results(seed) for seed in range(8)]
    barrier = Barrier(8)

    def several(seed: int) -> bool:
        torch.set_num_threads(pytorch_threads)  # it is of each thread
        barrier.wait()
        return all(equal(results(seed), expected[seed]) for _ in range(3))

    with threads(pytorch_threads), ThreadPoolExecutor(8) as pool:
        assert all(pool.map(several, range(8)))
