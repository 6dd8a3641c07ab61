"""A copy of the checkout in which edits are made, compiled and tested."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .catalogue import Mutation, Suite

_BUILD = {
    "cpu": [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
    "emulation": [sys.executable, "-c", "from tests.emulation.build import build; build('_emulated_cuda')"],
}
IMPORTED = ("torch", "scipy.stats", "hypothesis")
"""What takes most of a short test's time and is never edited. Not Triton, whose import reads what tests set."""
_LIBRARY = "attbalance_ext/kernels/lib/libattbalance_cpu.so"
_KEPT = ("build", "attbalance_ext/kernels/lib")
"""What builds leave in the copy: it is what makes the next one short."""

_NO_LIMIT = 100_000
_LONGEST = 3600
"""Seconds on the wall that a build or a run of tests may take; such a run has not caught anything."""

_running: set[int] = set()
"""Process groups: what tests start ends with them."""


def end_all() -> None:
    """Kill what runs in any copy, with all that it started."""
    for group in tuple(_running):
        _end(group)


def _end(group: int) -> None:
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
    """On the wall."""
    work: float
    """Seconds of a processor's time."""
    said: str
    """The first failure, or the last line."""


class Tree:
    """A copy of the checkout ``source`` in ``folder``, which is kept for the next time.

    imported: modules that all tests share.
    """

    def __init__(self, source: Path, folder: Path, imported: Sequence[str] = IMPORTED) -> None:
        self.source, self.folder, self.imported = source, folder, imported
        self._forks: subprocess.Popen[str] | None = None

    def update(self) -> None:
        """Make it the checkout again. Files that are the same keep their times, which builds look at."""
        wanted = {path for path in _files(self.source) if (self.source / path).is_file()}
        for path in wanted:
            content, copy = (self.source / path).read_bytes(), self.folder / path
            if not copy.exists() or copy.read_bytes() != content:
                copy.parent.mkdir(parents=True, exist_ok=True)
                _write(copy, content)
                copy.chmod((self.source / path).stat().st_mode)
        for there in self.folder.rglob("*"):
            inside = there.relative_to(self.folder).as_posix()
            kept = inside.startswith(_KEPT) or there.suffix == ".pyc"
            if there.is_file() and inside not in wanted and not kept:
                there.unlink()

    @contextmanager
    def mutated(self, mutation: Mutation) -> Iterator[None]:
        """With the edit made. ``WrongEntry`` where it cannot be."""
        path = self.folder / mutation.file
        before = path.read_text()
        _write(path, mutation.applied_to(before).encode())
        try:
            yield
        finally:
            _write(path, before.encode())

    def take_library(self) -> None:
        """Use the checkout's C++ library, which is to be up to date."""
        built = self.source / _LIBRARY
        if not built.exists():
            raise BuildFailed(f"{_LIBRARY} was not built: make setup")
        (self.folder / _LIBRARY).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, self.folder / _LIBRARY)

    def build(self, what: str) -> None:
        """Bring a library up to date with the copy's csrc/; ``BuildFailed`` where it does not compile."""
        done = self._run(_BUILD[what], limit=_LONGEST)
        if done.returncode:
            raise BuildFailed(done.stdout[-2000:])

    def test(self, suite: Suite, limit: int = _NO_LIMIT) -> TestRun:
        """Run tests up to the first failure, for at most ``limit`` seconds of a processor's time.

        The clock on the wall would call a busy machine an endless loop.
        """
        arguments = ["-x", "-q", "-p", "no:cacheprovider", *suite.tests]
        if suite.select:
            arguments += ["-k", suite.select]
        start = time.monotonic()
        code, work, said = self._pytest(arguments, limit)
        seconds = time.monotonic() - start
        lines = said.strip().splitlines() or [""]
        failures = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
        if code == -signal.SIGKILL:
            return TestRun(False, False, seconds, work, f"no end after {seconds:.0f} s, and no work either")
        if code < 0:
            failures = [f"ended by {signal.Signals(-code).name} after {work:.0f} s of work"]
        # 0 and 1 are pytest's for tests that ran, negative ones are crashes.
        ran = code < 0 or code == 1 or bool(re.search(r"\d+ passed", lines[-1]))
        return TestRun(code == 0, ran, seconds, work, (failures or lines[-1:])[0])

    def close(self) -> None:
        """End what runs its tests; the folder stays."""
        if self._forks is not None:
            self._forks.communicate()  # closes its input, which ends it
            _running.discard(self._forks.pid)
            self._forks = None

    def _pytest(self, arguments: list[str], limit: int) -> tuple[int, float, str]:
        """Exit code (negative: a signal), seconds of a processor's time, output."""
        if self._forks is None:
            self._forks = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("forks.py")), *self.imported],
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            _running.add(self._forks.pid)
        assert self._forks.stdin is not None
        assert self._forks.stdout is not None
        output = self.folder.with_suffix(".txt")
        order = {"arguments": arguments, "output": str(output), "limit": limit}
        self._forks.stdin.write(json.dumps(order) + "\n")
        self._forks.stdin.flush()
        child = int(self._forks.stdout.readline())
        _running.add(child)
        waiting = threading.Timer(_LONGEST, _end, [child])
        waiting.start()
        code, work = self._forks.stdout.readline().split()
        waiting.cancel()
        _running.discard(child)
        return int(code), float(work), output.read_text(errors="replace")

    def _run(self, command: list[str], limit: float) -> subprocess.CompletedProcess[str]:
        with subprocess.Popen(
            command,
            cwd=self.folder,
            env=self._environment(),
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

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "PYTHONPATH": str(self.folder),  # before an installed package of this name
            "PYTEST_TIMEOUT": "0",  # of the clock on the wall, see `test`
            "ATTBALANCE_CPU": "1",
            "ATTBALANCE_CUDA": "0",
        }


def _write(path: Path, content: bytes) -> None:
    """And drop the bytecode: after an edit of the same size within a second Python would take the old one."""
    path.write_bytes(content)
    if path.suffix == ".py":
        Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)


def _files(checkout: Path) -> list[str]:
    """What git would keep, and what is new."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.PIPE, text=True)
    return [path for path in listed.stdout.split("\0") if path]
