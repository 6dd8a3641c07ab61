"""Both ops in four threads of Python at once, for a process in which ThreadSanitizer watches.

pytest passes while ThreadSanitizer has found something: the exit status of the process says so.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import pytest
import torch
from helpers import same_bits, threads
from helpers_attention import LAYOUTS, make_problem, solve
from helpers_loss import make_loss_problem, solve_loss
from helpers_pairwise import case_id, pairwise

from attbalance_ext import AttBalanceConfig
from tests.sanitised import process

THREADS = 4  # of Python; each has as many of PyTorch's
ATTENTION: dict[str, list[Any]] = {
    "key_dtype": [(torch.float32,), (torch.bfloat16,), (torch.float16,)],
    "teacher_dtype": [None, torch.float32],
    "tokens": [31, 401],
    "batch": [1, 20],  # one row is cut into chunks
    "width": [7, 257],
    "layout": list(LAYOUTS),
    "region": ["touch", "weights"],
    "padded": [False, True],
}
LOSS: dict[str, list[Any]] = {
    "layers": [1, 4],
    "batch": [3, 2000],
    "stages": [None, 2],
    "invalid": [False, True],
}
Result = TypeVar("Result")


def at_once(action: Callable[[], Result]) -> list[Result]:
    """What each of several threads gets that start together."""
    barrier = Barrier(THREADS)

    def started_together() -> Result:
        torch.set_num_threads(THREADS)  # it is of each thread
        barrier.wait()
        return action()

    with ThreadPoolExecutor(THREADS) as pool:
        running = [pool.submit(started_together) for _ in range(THREADS)]
        return [each.result() for each in running]


@pytest.fixture(autouse=True)
def _several_threads() -> Iterator[None]:
    with threads(THREADS):
        yield


@pytest.mark.parametrize("case", pairwise(ATTENTION), ids=case_id)
def test_attention_terms(case: dict[str, Any]) -> None:
    problem = make_problem(**case)
    expected = solve(problem, "cpu").tensors()
    for found in at_once(lambda: solve(problem, "cpu")):
        assert all(map(same_bits, found.tensors(), expected))


@pytest.mark.parametrize("case", pairwise(LOSS), ids=case_id)
def test_balanced_loss(case: dict[str, Any]) -> None:
    problem, config = make_loss_problem(**case), AttBalanceConfig()
    expected = solve_loss(problem, config, "cpu").tensors()
    for found in at_once(lambda: solve_loss(problem, config, "cpu")):
        assert all(map(same_bits, found.tensors(), expected))


# --- ThreadSanitizer is on -------------------------------------------------------------------------------------------

PROGRAM = """
import ctypes, sys
from tests.sanitised.threads_suite import at_once, torch
torch.set_num_threads(4)
call = getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])
at_once(lambda: call(1_000_000)) if sys.argv[3:] else call(1000)
"""


@pytest.mark.parametrize(
    ("control", "in_threads", "found"),
    [("separate_pieces", False, False), ("racing_pieces", False, True), ("racing_calls", True, True)],
)
def test_races_are_found(control: str, in_threads: bool, found: bool) -> None:
    arguments = ["-c", PROGRAM, os.environ[process.CONTROLS], control, *(["threads"] if in_threads else [])]
    done = process.run(process.THREAD, *arguments, PYTHONPATH=os.pathsep.join(sys.path))
    assert done.returncode == (66 if found else 0), done.stdout
    assert (f"data race {process.ROOT / 'tests/sanitised/controls.cpp'}" in done.stdout) is found
