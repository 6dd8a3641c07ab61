"""Does one wheel serve every Python and PyTorch? Install it beside each, without a compiler, and run its tests there.

    python scripts/check_wheel.py [WHEEL] [--with PYTHON:TORCH]... [--select EXPRESSION]

WHEEL is by default the one in dist/ (make wheel). Each pair, like ``3.12:2.11.0``, gets a new environment that finds
no compiler, no nvcc, no CMake: PATH has nothing else. Into it go PyTorch from the package index, the wheel and what
the tests need. There `attbalance info` and the library's own tests run, from a folder outside the checkout. Prints a
table. Exit code 1 if anything failed, 2 if nothing could be tested.

A PyTorch with CUDA is 3 GB to download and 6 GB on disk, one environment at a time. Pythons are looked for in PATH
and among pyenv's; a pair that this machine cannot have is a row that says so. The CUDA kernels run on the emulated
device, which has to be compiled, and Triton's are not in the wheel's libraries, so both are left out; that the CUDA
library loads beside a PyTorch with CUDA is checked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "lock.txt"
# The oldest and the newest, what the libraries are built with, and others between.
PAIRS = ("3.10:2.10.0", "3.11:2.13.0", "3.12:2.11.0", "3.12:2.12.1", "3.13:2.14.1")
TESTS = (
    *("attention_terms", "balanced_loss", "tap", "teacher"),
    *("test_attention_map.py", "test_backends.py", "test_correlation.py", "test_info.py", "test_region.py"),
)
SELECT = "not cuda and not triton and not launches"
NEEDED_BY_TESTS = ("hypothesis", "numpy", "pytest", "pytest-timeout", "pytest-xdist", "scipy")
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "cmake", "ninja")


class Failed(Exception):
    """A command failed; the message is the end of what it said."""


@dataclass
class Row:
    """What one environment gave."""

    python: str
    torch: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    backends: str = ""
    libraries: str = ""
    seconds: float = 0.0
    problem: str = ""

    @property
    def good(self) -> bool:
        return not self.problem and self.passed > 0 and not self.failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", nargs="?", type=Path, help="default: the one in dist/")
    parser.add_argument(
        "--with", dest="pairs", action="append", metavar="PYTHON:TORCH", help=f"default: {' '.join(PAIRS)}"
    )
    parser.add_argument("--select", default=SELECT, help="which tests, pytest's -k (default: %(default)s)")
    parser.add_argument("--jobs", default="2", help="test processes (default: %(default)s)")
    options = parser.parse_args()
    wheel = (options.wheel or only_wheel(ROOT / "dist")).resolve()
    print(f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
    rows = []
    for pair in options.pairs or PAIRS:
        python, torch = pair.split(":")
        row, start = Row(python, torch), time.monotonic()
        try:
            check(wheel, row, options.select, options.jobs)
        except Failed as failure:
            row.problem = str(failure)
        row.seconds = time.monotonic() - start
        rows.append(row)
        print(table([row]).splitlines()[-1] + (f"\n{row.problem}" if row.problem else ""), flush=True)
    print(f"\n{table(rows)}")
    if not any(row.passed for row in rows):
        return 2
    return 0 if all(row.good or row.problem.startswith("not here") for row in rows) else 1


def only_wheel(folder: Path) -> Path:
    wheels = list(folder.glob("attbalance_ext-*.whl"))
    if len(wheels) != 1:
        sys.exit(f"{folder} has {len(wheels)} wheels: make wheel, or name one")
    return wheels[0]


def table(rows: Sequence[Row]) -> str:
    lines = ["| Python | PyTorch | passed | failed | skipped | backends | libraries loaded | s |", "| --- " * 8 + "|"]
    for row in rows:
        counts = f"{row.passed} | {row.failed} | {row.skipped}"
        if row.problem:
            counts = f"{row.problem.splitlines()[0]} | |"
        lines.append(
            f"| {row.python} | {row.torch} | {counts} | {row.backends} | {row.libraries} | {row.seconds:.0f} |"
        )
    return "\n".join(lines)


def check(wheel: Path, row: Row, select: str, jobs: str) -> None:
    """Fill in the row; ``Failed`` where it comes to no test."""
    interpreter = find_python(row.python)
    if interpreter is None:
        raise Failed(f"not here: Python {row.python}")
    with tempfile.TemporaryDirectory(prefix="check-wheel-") as work:
        environment = Path(work) / "environment"
        run([interpreter, "-m", "venv", str(environment)])
        python = str(environment / "bin" / "python")
        row.python = run([python, "-c", "import platform; print(platform.python_version())"]).strip()
        alone = {
            **{name: value for name, value in os.environ.items() if not re.match("ATTBALANCE|PYTHON|TRITON", name)},
            "PATH": str(environment / "bin"),
        }
        for compiler in COMPILERS:
            if shutil.which(compiler, path=alone["PATH"]):
                raise Failed(f"{compiler} is in the environment")
        install(python, row.torch, wheel, Path(work), alone)
        outside = Path(work) / "outside"
        shutil.copytree(ROOT / "tests", outside / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", outside)
        look(python, row, alone, outside)
        test(python, row, alone, outside, select, jobs)


def find_python(version: str) -> str | None:
    """An interpreter of this version, "3.12" or "3.12.1"."""
    found = shutil.which(f"python{version}", path=os.defpath + os.pathsep + os.environ.get("PATH", ""))
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    others = [str(path) for path in sorted(pyenv.glob(f"{version}*/bin/python"), reverse=True)]
    for candidate in [*others, *([found] if found else [])]:
        program = "import sys, venv, ensurepip; print('%d.%d.%d' % sys.version_info[:3])"
        answer = subprocess.run([candidate, "-c", program], capture_output=True, text=True, check=False).stdout.strip()
        if answer == version or answer.startswith(f"{version}."):
            return candidate
    return None


def install(python: str, torch: str, wheel: Path, work: Path, environment: dict[str, str]) -> None:
    """PyTorch first and alone, so that nothing else can choose another; wheels only."""
    pip = [
        python,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "-q",
        "--no-compile",
        "--only-binary",
        ":all:",
    ]
    try:
        run([*pip, f"torch=={torch}"], environment)
    except Failed as failure:
        if "No matching distribution" in str(failure):
            raise Failed(f"not here: PyTorch {torch} for this Python") from failure
        raise
    constraints = work / "constraints.txt"  # the versions of development, but for what this PyTorch decides
    pins = re.findall(r"^\S+==[^\\\n]+", LOCK.read_text(), re.MULTILINE)
    decided = re.compile(r"(triton|setuptools|fsspec|filelock|sympy|networkx|mpmath|typing-extensions)==")
    constraints.write_text("\n".join(pin for pin in pins if not decided.match(pin)))
    run([*pip, "-c", str(constraints), str(wheel), *NEEDED_BY_TESTS], environment)


def look(python: str, row: Row, environment: dict[str, str], outside: Path) -> None:
    """The installed package, not the checkout; what `attbalance info` says of it."""
    program = "import attbalance_ext as a, torch as t; print(a.__file__, t.__version__, t.version.cuda)"
    where, row.torch, cuda = run([python, "-c", program], environment, outside).rsplit(maxsplit=2)
    if "site-packages" not in where:
        raise Failed(f"attbalance_ext comes from {where}")
    said = json.loads(run([python, "-m", "attbalance_ext.info", "--json", "--require", "cpu"], environment, outside))
    unusable = {finding["about"] for finding in said["findings"]}
    row.backends = ", ".join(check["backend"] for check in said["checks"] if check["passed"])
    row.libraries = ", ".join(
        library["name"].removeprefix("libattbalance_").removesuffix(".so")
        for library in said["libraries"]
        if library["loaded"]
    )
    for library in said["libraries"]:
        if library["size"] and not library["loaded"] and (library["name"] == "libattbalance_cpu.so" or cuda != "None"):
            raise Failed(f"{library['name']} is not loaded: {said['findings']}")
    if "cpu" in unusable or not said["passed"]:
        raise Failed(f"attbalance info: {said['findings']}")


def test(python: str, row: Row, environment: dict[str, str], outside: Path, select: str, jobs: str) -> None:
    report = outside / "report.xml"
    tests = [f"tests/{name}" for name in TESTS]
    command = [python, "-m", "pytest", "-q", "-n", jobs, "-k", select, "--junitxml", str(report), *tests]
    done = subprocess.run(command, env=environment, cwd=outside, capture_output=True, text=True, check=False)
    if not report.exists():
        raise Failed(done.stdout[-3000:] + done.stderr[-1000:])
    counts = ElementTree.parse(report).getroot()[0].attrib  # noqa: S314 - pytest has just written it
    row.failed = int(counts["failures"]) + int(counts["errors"])
    row.skipped = int(counts["skipped"])
    row.passed = int(counts["tests"]) - row.failed - row.skipped
    if done.returncode or row.failed:
        print(done.stdout[-6000:])


def run(command: Sequence[str], environment: dict[str, str] | None = None, where: Path | None = None) -> str:
    done = subprocess.run(command, env=environment, cwd=where, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(command[:4])} ... failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
