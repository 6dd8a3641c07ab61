"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulation import build

ROOT = Path(__file__).parents[2]


def runtime(library: str) -> str:
    """The compiler's own copy of a library; skips the test where it has none."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler {compiler}")
    path = subprocess.check_output([compiler, f"-print-file-name={library}"], text=True).strip()
    if not Path(path).is_absolute():
        pytest.skip(f"{compiler} has no {library}")
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_suites_pass_under_the_sanitisers() -> None:
    # The C++ library beside it, so that AddressSanitizer finds the exceptions that it watches.
    preload = f"{runtime('libasan.so')} {runtime('libstdc++.so')}"
    for module in ("_tiny_kernels", "_emulated_cuda"):
        build.build(module, "sanitised")
    suites = [f"tests/emulation/{name}" for name in ("test_emulator.py", "sanitised_suite.py")]
    done = subprocess.run(
        # -s: an error ends the process, and captured output would be lost with it.
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", *suites],
        cwd=ROOT,
        env={
            **os.environ,
            "LD_PRELOAD": preload,
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "ATTBALANCE_EMULATION_VARIANT": "sanitised",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
