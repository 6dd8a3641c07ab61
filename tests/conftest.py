"""Settings that every test shares: seeds, threads, which tests this machine can run."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import nullcontext

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels run on CPU tensors

from helpers_triton import prepare_interpreter

from attbalance_ext.kernels import ops
from tests.emulation import emulated_cuda

# The same examples on every run and machine; a first call may compile, so no deadline per example.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    if ops.TRITON_IS_INTERPRETED and not ops.triton_problems():
        prepare_interpreter()
    # The workers of `-n` are the parallelism; a thread pool in each would only fight over the same cores.
    torch.set_num_threads(1)


def pytest_report_header() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return f"torch {torch.__version__}, python {platform.python_version()}, {device}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which backends the run could exercise: a green run without a backend proves nothing about it."""
    terminalreporter.section("backends")
    try:
        from attbalance_ext import available_backends
    except ImportError as error:  # the tests have failed with it; their report must not be lost here
        terminalreporter.line(f"none: {error}")
        return
    for name, reasons in available_backends().items():
        terminalreporter.line(f"{name:10} {'; '.join(reasons) if reasons else 'tested'}")


@pytest.fixture(autouse=True)
def _emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test whose parameter `backend` is "cuda" runs the CUDA kernels on the host, unless it asks for a GPU."""
    callspec = getattr(request.node, "callspec", None)
    emulated = callspec is not None and callspec.params.get("backend") == "cuda" and "gpu" not in request.keywords
    with emulated_cuda() if emulated else nullcontext():
        yield


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random numbers whatever ran before, and no backend chosen by the caller's shell."""
    torch.manual_seed(0)
    monkeypatch.delenv("ATTBALANCE_BACKEND", raising=False)
