"""The build's switches, without building: what setup.py says, and which GPUs CMake is told to compile for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CMAKE = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
if CMAKE is None:
    pytest.skip("needs CMake", allow_module_level=True)


def setup(**environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py up to the point where it knows what to build, on a machine without nvcc."""
    clean = {name: value for name, value in os.environ.items() if not re.match("ATTBALANCE|CUDA|FORCE_CUDA", name)}
    where = {"ATTBALANCE_CPU": "0", "CUDA_HOME": "/nowhere"}
    command = [sys.executable, "setup.py", "--name"]
    return subprocess.run(command, cwd=ROOT, env=clean | where | environment, capture_output=True, text=True)


def test_auto_says_what_is_missing_and_goes_on() -> None:
    done = setup()
    assert done.returncode == 0
    assert "the CUDA kernels need the CUDA toolkit's nvcc" in done.stderr
    assert "installing without them" in done.stderr


def test_without_a_compiler_the_package_is_python_alone() -> None:
    """`pip install` goes on, and `pip install -v` and `attbalance info` say what is missing."""
    done = setup(ATTBALANCE_CPU="auto", PATH="/nowhere")
    assert done.returncode == 0
    for kernels in ("C++", "CUDA"):
        assert f"the {kernels} kernels need a C++ compiler (g++ or clang++)" in done.stderr
    assert done.stderr.count("installing without them") == 2


@pytest.mark.parametrize("asked", [{"ATTBALANCE_CUDA": "1"}, {"FORCE_CUDA": "1"}])
def test_what_is_asked_for_and_cannot_be_built_is_an_error(asked: dict[str, str]) -> None:
    done = setup(**asked)
    assert done.returncode == 1
    assert done.stderr.startswith("attbalance_ext: the CUDA kernels need the CUDA toolkit's nvcc")


def test_an_explicit_switch_goes_before_force_cuda() -> None:
    done = setup(FORCE_CUDA="1", ATTBALANCE_CUDA="0")
    assert done.returncode == 0
    assert "ATTBALANCE_CUDA=0, installing without the CUDA kernels" in done.stdout


@pytest.mark.parametrize("switch", ["ATTBALANCE_CPU", "ATTBALANCE_CUDA"])
def test_unknown_answers_are_refused(switch: str) -> None:
    done = setup(**{switch: "yes"})
    assert done.returncode == 1
    assert f"{switch} must be auto, 1 or 0, got 'yes'" in done.stderr


@pytest.mark.parametrize("switch", ["ATTBALANCE_CPU", "ATTBALANCE_CUDA"])
def test_no_compiler_is_said_for_each_library(switch: str) -> None:
    done = setup(**{switch: "1", "CXX": "no-such-compiler"})
    assert done.returncode == 1
    assert "a C++ compiler (no-such-compiler)" in done.stderr


def architectures(given: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "show.cmake"
    script.write_text(
        f'include("{ROOT}/cmake/cuda_architectures.cmake")\n'
        f'cuda_architectures(found "{given}")\nmessage(STATUS "[${{found}}]")\n'
    )
    assert CMAKE is not None
    return subprocess.run([CMAKE, "-P", str(script)], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("8.0 9.0+PTX", "80-real;90"),
        ("8.6;9.0", "86-real;90-real"),
        ("9.0a 12.0", "90a-real;120-real"),
        ("10.0f+PTX", "100f"),
    ],
)
def test_architectures_in_pytorch_s_syntax(given: str, found: str, tmp_path: Path) -> None:
    assert architectures(given, tmp_path).stdout.strip() == f"-- [{found}]"


@pytest.mark.parametrize("given", ["Hopper", "90", "sm_90", "9.0+SASS", " "])
def test_unknown_architectures_are_refused(given: str, tmp_path: Path) -> None:
    done = architectures(given, tmp_path)
    assert done.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST" in done.stderr
