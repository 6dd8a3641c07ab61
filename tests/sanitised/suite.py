"""Both ops on a small set of cases, for a process in which AddressSanitizer and UndefinedBehaviorSanitizer watch."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import NATIVE, poisoned_memory, same_bits, threads
from helpers_attention import LAYOUTS, assert_solves, literal, make_problem, solve
from helpers_loss import assert_solves_loss, literal_loss, make_loss_problem, solve_loss
from helpers_pairwise import case_id, pairwise

from attbalance_ext import AttBalanceConfig
from attbalance_ext.kernels import ops
from tests.emulation import build, emulated_cuda
from tests.sanitised.exchange import LIBRARY
from tests.sanitised.process import CONTROLS


def ways(backend: str, multiprocessors: int = 132) -> list[AbstractContextManager[Any]]:
    """How to run a kernel, which gives the same bits in each way if it is right."""
    if backend == "cpu":
        return [threads(1), threads(4)]
    other_order = emulated_cuda(
        multiprocessors=multiprocessors, block_order="shuffled", thread_order="reversed", shared_fill=0
    )
    return [emulated_cuda(multiprocessors=multiprocessors), other_order]


ATTENTION: dict[str, list[Any]] = {
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "tokens": [1, 31, 401],
    "batch": [0, 2],
    "width": [7, 32, 257, 1030],
    "layout": list(LAYOUTS),
    "region": ["touch", "coverage", "weights"],
    "padded": [False, True],
    "teacher": [False, True],
    "multiprocessors": [1, 132],
}
LOSS: dict[str, list[Any]] = {
    "layers": [1, 4],
    "batch": [1, 3, 70, 300],
    "stages": [None, 2],
    "ties": [False, True],
    "invalid": [False, True],
    "rho": ["batch", "off"],
}


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("case", pairwise(ATTENTION), ids=case_id)
def test_attention_terms(backend: str, case: dict[str, Any]) -> None:
    dtype = case["dtype"]
    problem = make_problem(
        layers=2,
        batch=case["batch"],
        tokens=case["tokens"],
        width=case["width"],
        key_dtype=(dtype,),
        teacher_dtype=dtype if case["teacher"] else None,
        layout=case["layout"],
        region=case["region"],
        padded=case["padded"],
    )
    found = []
    for way in ways(backend, case["multiprocessors"]):
        with way, poisoned_memory():
            found.append(solve(problem, backend))
    assert_solves(found[0], literal(problem))
    assert all(map(same_bits, found[0].tensors(), found[1].tensors()))


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("case", pairwise(LOSS), ids=case_id)
def test_balanced_loss(backend: str, case: dict[str, Any]) -> None:
    config = AttBalanceConfig(rho=case["rho"])
    problem = make_loss_problem(**{name: value for name, value in case.items() if name != "rho"})
    found = []
    for way in ways(backend):
        with way, poisoned_memory():
            found.append(solve_loss(problem, config, backend))
    assert_solves_loss(found[0], literal_loss(problem, config))
    assert all(map(same_bits, found[0].tensors(), found[1].tensors()))


# --- the sanitisers are on -------------------------------------------------------------------------------------------


def last_words(action: Callable[[], None]) -> str:
    """What a process that does this, and is ended for it, says."""
    with tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if child == 0:
            faulthandler.disable()
            os.dup2(stderr.fileno(), 2)
            action()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        stderr.seek(0)
        said = stderr.read().decode()
    assert os.waitstatus_to_exitcode(status) != 0
    return said


@pytest.mark.parametrize("backend", ["cpu"])  # named as above, to be picked with them
def test_the_watched_library_is_the_one_that_runs(backend: str) -> None:
    mapped = Path("/proc/self/maps").read_text()
    assert os.environ[LIBRARY] in mapped
    assert str(ops.CPU_LIBRARY) not in mapped


@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize(
    ("control", "right", "wrong", "finding"),
    [
        ("read_value", 8, 9, "heap-buffer-overflow"),
        ("next_number", 2**31 - 2, 2**31 - 1, "signed integer overflow"),
    ],
)
def test_errors_of_the_host_are_found(backend: str, control: str, right: int, wrong: int, finding: str) -> None:
    call = getattr(ctypes.CDLL(os.environ[CONTROLS]), control)
    call(right)
    assert finding in last_words(lambda: call(wrong))


def test_access_beyond_a_tensor_is_found() -> None:
    kernels = build.load("_tiny_kernels")
    inside, outside = torch.zeros(9), torch.zeros(10)
    for source, target in ((inside, outside), (outside, inside)):
        pointers = source.data_ptr(), target.data_ptr()
        kernels.copy((1, 1, 1), (32, 1, 1), 0, *pointers, 9)
        said = last_words(lambda: kernels.copy((1, 1, 1), (32, 1, 1), 0, *pointers, 10))  # noqa: B023
        assert "heap-buffer-overflow" in said


def test_access_beyond_shared_memory_is_found() -> None:
    kernels = build.load("_tiny_kernels")
    found = torch.zeros(8)
    kernels.read_shared((1, 1, 1), (4, 1, 1), 16, found.data_ptr())
    read = last_words(lambda: kernels.read_shared((1, 1, 1), (5, 1, 1), 16, found.data_ptr()))
    write = last_words(lambda: kernels.write_shared((1, 1, 1), (1, 1, 1), 10, 10, 1))
    assert "use-after-poison" in read
    assert "use-after-poison" in write


def test_misaligned_access_is_found() -> None:
    kernels = build.load("_tiny_kernels")
    values, found = torch.zeros(20), torch.zeros(20)
    copy = kernels.copy_vectors
    copy((1, 1, 1), (4, 1, 1), 0, values.data_ptr(), found.data_ptr(), 4)
    said = last_words(lambda: copy((1, 1, 1), (4, 1, 1), 0, values.data_ptr() + 4, found.data_ptr(), 4))
    assert "misaligned address" in said
