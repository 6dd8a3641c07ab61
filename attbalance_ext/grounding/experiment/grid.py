"""Runs the cells of a study, several at a time, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.progress import Progress, TaskID

from attbalance_ext.grounding.experiment.record import record_path
from attbalance_ext.grounding.experiment.spec import Cell
from attbalance_ext.grounding.experiment.worker import BUSY, FAILED
from attbalance_ext.grounding.fit import stop_requested
from attbalance_ext.grounding.progress import progress_bars
from attbalance_ext.grounding.provenance import cpu_model
from attbalance_ext.grounding.runs import require_runnable
from attbalance_ext.grounding.settings import Settings

RUNS_ON_A_GPU = 4
"""Cells at a time on one GPU: a tiny model's step is bound by launches, and several share the GPU well."""


@dataclass(frozen=True)
class Places:
    """Where everything of a study lies."""

    records: Path
    runs: Path
    cache: Path | None = None

    def record(self, cell: Cell) -> Path:
        return record_path(self.records, cell.settings)

    def run(self, cell: Cell) -> Path:
        return self.runs / self.record(cell).stem

    def left(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells without a record, each run once where several cells are the same one."""
        found = {self.record(cell): cell for cell in reversed(cells) if not self.record(cell).exists()}
        return list(reversed(found.values()))


@dataclass
class Outcome:
    """What became of the cells that were to be run."""

    finished: list[Cell] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Message by the cell's name."""
    busy: list[Cell] = field(default_factory=list)
    """Another grid is at them."""
    interrupted: int = 0
    """The exit code after a signal."""


def default_jobs(device: str, threads: int) -> int:
    """As many as there are processors for (``threads`` each), or GPUs."""
    if device.startswith("cuda"):
        return RUNS_ON_A_GPU * (torch.cuda.device_count() if device == "cuda" else 1)
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    processors = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(processors // threads, 1)


def run_grid(
    cells: Sequence[Cell],
    places: Places,
    *,
    splits: Sequence[str],
    versions: Mapping[str, str],
    device: str = "cpu",
    jobs: int,
    threads: int = 1,
) -> Outcome:
    """Run every cell that has no record yet, ``jobs`` at a time, in order.

    A cell that was begun goes on where it was. One that fails is reported, and the others go on. Ctrl-C or SIGTERM:
    every running cell saves its state and stops; the same call goes on from there. On ``cuda`` cells take turns on all
    GPUs. A run's bits on a CPU depend on ``threads`` (one: the same everywhere), and never on ``jobs``. ``versions``:
    what the records say about software and hardware, name to value.

    Raises:
        UserError: there is no such device.
    """
    require_runnable(Settings(device=device))  # said once, and not by every cell
    outcome = Outcome()
    left = places.left(cells)
    with progress_bars() as progress, stop_requested() as stop, ThreadPoolExecutor(jobs) as pool:
        total = progress.add_task("cells", total=len(left), note="")
        machine = {"cpu": cpu_model(), **versions, "cpu threads": str(threads)}
        runner = _Runner(places, tuple(splits), machine, device, threads, progress, total, stop, outcome)
        futures = [pool.submit(runner, number, cell) for number, cell in enumerate(left)]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()  # the pool waits for its threads, and they for their cells
            raise
    outcome.interrupted = stop.exit_code if stop.is_set() else 0
    return outcome


class _Runner:
    def __init__(
        self,
        places: Places,
        splits: tuple[str, ...],
        machine: dict[str, str],
        device: str,
        threads: int,
        progress: Progress,
        total: TaskID,
        stop: threading.Event,
        outcome: Outcome,
    ) -> None:
        self.places, self.splits, self.machine, self.device, self.threads = places, splits, machine, device, threads
        self.progress, self.total, self.stop, self.outcome = progress, total, stop, outcome
        self.gpus = torch.cuda.device_count() if device == "cuda" else 0

    def __call__(self, number: int, cell: Cell) -> None:
        if self.stop.is_set():
            return
        if self.places.record(cell).exists():  # another grid has finished it since
            self.progress.advance(self.total)
            return
        steps = cell.settings.steps
        bar = self.progress.add_task(cell.name, total=steps if cell.settings.epochs is None else None, note="")
        try:
            code, message = self._run(number, cell, bar)
        except OSError as error:  # no space left, no more processes
            code, message = FAILED, str(error)
        self.progress.remove_task(bar)
        if code == BUSY:
            self.outcome.busy.append(cell)
        elif code == 0:
            self.outcome.finished.append(cell)
        elif not self.stop.is_set():
            self.outcome.failed[cell.name] = message
        self.progress.advance(self.total)

    def _run(self, number: int, cell: Cell, bar: TaskID) -> tuple[int, str]:
        directory = self.places.run(cell)
        directory.mkdir(parents=True, exist_ok=True)
        device = f"cuda:{number % self.gpus}" if self.gpus else self.device
        order = {
            "settings": replace(cell.settings, device=device).to_dict(),
            "directory": str(directory),
            "record": str(self.places.record(cell)),
            "splits": self.splits,
            "machine": self.machine,
            "cache": str(self.places.cache) if self.places.cache else None,
            "threads": self.threads,
        }
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        log = directory / "log.txt"
        earlier = log.stat().st_size if log.exists() else 0
        with (
            open(log, "ab") as errors,
            subprocess.Popen(
                [sys.executable, "-m", "attbalance_ext.grounding.experiment.worker", json.dumps(order)],
                stdin=subprocess.PIPE,  # nothing is written to it: its end says that we are gone
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                errors="replace",
                env=environment,
                start_new_session=True,  # Ctrl-C is for us alone; what runs is told by us, after its step
            ) as process,
        ):
            assert process.stdout is not None
            stopper = threading.Thread(target=_terminate_on, args=(process, self.stop), daemon=True)
            stopper.start()
            for line in process.stdout:
                self._show(bar, line)
            code = process.wait()
        return code, f"{_reason(code, log.read_bytes()[earlier:].decode(errors='replace'))} ({log})"

    def _show(self, bar: TaskID, line: str) -> None:
        try:
            said = json.loads(line)
            step, accuracy = said["step"], said["accuracy"]
        except (ValueError, TypeError, KeyError):
            return  # a library that prints
        note = "" if accuracy is None else f"val acc {100 * accuracy:.1f} %"
        self.progress.update(bar, completed=step, note=note)


def _reason(code: int, said: str) -> str:
    """Why a process ended with ``code``, which ``said`` so much on standard error."""
    if code < 0:  # it could say nothing about that
        return f"ended by signal {-code} ({signal.strsignal(-code)})"
    lines = said.strip().splitlines()
    return lines[-1] if lines else f"exit code {code}"


def _terminate_on(process: subprocess.Popen[str], stop: threading.Event) -> None:
    """SIGTERM to the process once ``stop`` is set."""
    while process.poll() is None:
        if stop.wait(0.2):
            process.terminate()
            return
