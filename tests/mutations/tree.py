"""A copy of the checkout in which edits are made, compiled and tested."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .catalogue import Mutation, Suite

_BUILD = {
    "cpu": [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
    "emulation": [sys.executable, "-c", "from tests.emulation.build import build; build('_emulated_cuda')"],
}
_LIBRARY = "attbalance_ext/kernels/lib/libattbalance_cpu.so"
_KEPT = ("build", "attbalance_ext/kernels/lib")
"""What builds leave in the copy: it is what makes the next one short."""


_running: set[int] = set()
"""Process groups: what tests start ends with them."""


def end_all() -> None:
    """Kill what runs in any copy, with all that it started."""
    for group in tuple(_running):
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


class BuildFailed(Exception):
    """The message is the end of what the build said."""


@dataclass(frozen=True)
class TestRun:
    """How the tests ended."""

    __test__ = False  # no class of tests, whatever pytest makes of its name

    passed: bool
    collected: bool
    """Whether there were tests that could be run at all."""
    seconds: float
    said: str
    """The first failure, or the last line."""


class Tree:
    """A copy of the checkout ``source`` in ``folder``, which is kept for the next time."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source, self.folder = source, folder

    def update(self) -> None:
        """Make it the checkout again. Files that are the same keep their times, which builds look at."""
        wanted = {path for path in _files(self.source) if (self.source / path).is_file()}
        for path in wanted:
            content, copy = (self.source / path).read_bytes(), self.folder / path
            if not copy.exists() or copy.read_bytes() != content:
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(content)
                copy.chmod((self.source / path).stat().st_mode)
        for there in self.folder.rglob("*"):
            inside = there.relative_to(self.folder).as_posix()
            if there.is_file() and inside not in wanted and not inside.startswith(_KEPT):
                there.unlink()

    @contextmanager
    def mutated(self, mutation: Mutation) -> Iterator[None]:
        """With the edit made. ``WrongEntry`` where it cannot be."""
        path = self.folder / mutation.file
        before = path.read_text()
        path.write_text(mutation.applied_to(before))
        try:
            yield
        finally:
            path.write_text(before)

    def take_library(self) -> None:
        """Use the checkout's C++ library, which is to be up to date."""
        built = self.source / _LIBRARY
        if not built.exists():
            raise BuildFailed(f"{_LIBRARY} was not built: make setup")
        (self.folder / _LIBRARY).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, self.folder / _LIBRARY)

    def build(self, what: str) -> None:
        """Bring a library up to date with the copy's csrc/; ``BuildFailed`` where it does not compile."""
        done = self._run(_BUILD[what], limit=3600)
        if done.returncode:
            raise BuildFailed(done.stdout[-2000:])

    def test(self, suite: Suite, limit: float) -> TestRun:
        """Run tests up to the first failure, for at most ``limit`` seconds."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *suite.tests]
        if suite.select:
            command += ["-k", suite.select]
        start = time.monotonic()
        try:
            done = self._run(command, limit)
        except subprocess.TimeoutExpired:
            return TestRun(False, True, time.monotonic() - start, f"no end after {limit:.0f} s")
        lines = done.stdout.strip().splitlines() or [""]
        failures = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
        if done.returncode < 0:
            failures = [f"ended by signal {-done.returncode}"]
        # 0 and 1 are pytest's for tests that ran, negative ones are crashes.
        ran = done.returncode < 0 or done.returncode == 1 or bool(re.search(r"\d+ passed", lines[-1]))
        return TestRun(done.returncode == 0, ran, time.monotonic() - start, (failures or lines[-1:])[0])

    def _run(self, command: list[str], limit: float) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "PYTHONPATH": str(self.folder),  # before an installed package of this name
            "PYTHONDONTWRITEBYTECODE": "1",  # an edit of the same size within a second would meet the old bytecode
            "ATTBALANCE_CPU": "1",
            "ATTBALANCE_CUDA": "0",
        }
        with subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        ) as process:
            _running.add(process.pid)
            try:
                said, _ = process.communicate(timeout=limit)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            finally:
                _running.discard(process.pid)
        return subprocess.CompletedProcess(command, process.returncode, said)


def _files(checkout: Path) -> list[str]:
    """What git would keep, and what is new."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.PIPE, text=True)
    return [path for path in listed.stdout.split("\0") if path]
