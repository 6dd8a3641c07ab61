"""Processes in which a sanitiser watches the native code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from tests.emulation import build
from tests.sanitised.exchange import LIBRARY

ROOT = Path(__file__).parents[2]
MODULES = ("_tiny_kernels", "_emulated_cuda")
CONTROLS = "ATTBALANCE_SANITISED_CONTROLS"
# -s: an error ends the process, and captured output would be lost with it.
PYTEST = ("-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist")


class Sanitiser(NamedTuple):
    """One way to compile the CPU library, and what a process that loads it needs."""

    name: str
    flag: str  # the value of -fsanitize
    runtime: tuple[str, ...]  # libraries of the compiler, loaded before all others
    environment: Mapping[str, str]


ADDRESS = Sanitiser(
    "address",
    "address,undefined",
    # The C++ library beside it, so that AddressSanitizer finds the exceptions that it watches.
    ("libasan.so", "libstdc++.so"),
    {
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "ATTBALANCE_EMULATION_VARIANT": "sanitised",
    },
)
SUPPRESSIONS = Path(__file__).with_name("thread_suppressions.txt")
THREAD = Sanitiser("thread", "thread", ("libtsan.so",), {"TSAN_OPTIONS": f"exitcode=66:suppressions={SUPPRESSIONS}"})


class NoSanitiser(Exception):
    """The compiler has none; the message says which compiler, and what it lacks."""


def preload(sanitiser: Sanitiser) -> str:
    """The compiler's own copies of the runtime, for LD_PRELOAD."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise NoSanitiser(f"no C++ compiler {compiler}")
    paths = []
    for library in sanitiser.runtime:
        path = subprocess.check_output([compiler, f"-print-file-name={library}"], text=True).strip()
        if not Path(path).is_absolute():
            raise NoSanitiser(f"{compiler} has no {library}")
        paths.append(path)
    return " ".join(paths)


def compile_library(sanitiser: Sanitiser) -> dict[str, str]:
    """Bring the CPU library and the controls up to date; what tells a process where they are."""
    directory = ROOT / "build" / "sanitised" / f"{sanitiser.name}-torch-{torch.__version__}"
    targets = ("attbalance_cpu", "sanitised_controls")
    build.compile_with_cmake(Path(__file__).parent, directory, targets, f"-DATTBALANCE_SANITIZE={sanitiser.flag}")
    library, controls = directory / "library/libattbalance_cpu.so", directory / "libsanitised_controls.so"
    return {LIBRARY: str(library), CONTROLS: str(controls)}


def compile_emulation() -> None:
    """Bring the emulated CUDA kernels, with AddressSanitizer, up to date."""
    for module in MODULES:
        build.build(module, "sanitised")


def run(sanitiser: Sanitiser, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments and the sanitiser's runtime; stderr goes with stdout."""
    return _python(*arguments, **{**sanitiser.environment, "LD_PRELOAD": preload(sanitiser), **environment})


def run_tests(sanitiser: Sanitiser, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """pytest in such a process."""
    return run(sanitiser, *PYTEST, "-p", "tests.sanitised.exchange", *arguments, **environment)


def run_unwatched(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """pytest in an ordinary process, for tests that start watched ones."""
    return _python(*PYTEST, *arguments, **environment)


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
