"""The CPU kernels exist once for each vector width; the narrower ones must be right though they are not picked here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_narrower_vectors_pass_the_same_tests(isa: str) -> None:
    """In a new process: the choice is made once, at the first call."""
    files = [str(HERE / f"test_terms_{name}.py") for name in ("values", "extremes")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "cpu", *files]
    environment = os.environ | {"ATTBALANCE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=HERE.parent.parent, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
