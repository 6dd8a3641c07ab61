"""Studies small enough to be run within a test."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from attbalance_ext import cli
from attbalance_ext.grounding.data.dataset import load_arrays
from attbalance_ext.grounding.data.generate import SCENES
from attbalance_ext.grounding.data.names import BuiltinName
from attbalance_ext.grounding.experiment.grid import Places
from attbalance_ext.grounding.experiment.record import Record, load_record
from attbalance_ext.grounding.experiment.spec import Cell, Spec, load_spec
from attbalance_ext.grounding.files import exclusive

FEW_SCENES = {"train": 80, "val": 12, "fresh": 16}
TOP = """
title = "Small"
question = "Does it run?"
baseline = "plain"
data = ["builtin:refcoco"]
seeds = [0]
splits = ["fresh", "val"]
[settings]
steps = 95
batch_size = 8
warmup_steps = 4
validate_every = 20
checkpoint_every = 5
pretrain_steps = 2
model_options = { dim = 32, heads = 2, hidden = 32, layers = 3, supervised = [1, 2], dropout = 0.1 }
[models.transvg-tiny]
[variants.plain]
attbalance = false
"""
STUDY = TOP + "[variants.full]\n"


def fill_cache(folder: Path) -> Path:
    """A cache in which few scenes lie where other processes look for all of them."""
    for split, few in FEW_SCENES.items():
        many = SCENES[split]
        with pytest.MonkeyPatch.context() as monkey:
            monkey.setitem(SCENES, split, few)
            load_arrays(BuiltinName("refcoco", False), split, cache=folder, progress=False)
        (file,) = folder.glob(f"*-{split}-{few}x*.npz")
        file.rename(file.with_name(file.name.replace(f"-{few}x", f"-{many}x")))
    return folder


class Said(NamedTuple):
    code: int
    out: str
    err: str


def call(*arguments: str | Path) -> Said:
    """Run the command line in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as monkey, redirect_stdout(out), redirect_stderr(err):
        monkey.setattr(sys, "argv", ["attbalance", *map(str, arguments)])
        monkey.setenv("COLUMNS", "300")
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Said(code, out.getvalue(), err.getvalue())


@dataclass
class Study:
    """A study in a folder, with its records and runs beside it."""

    folder: Path
    cache: Path
    text: str = STUDY

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self.text)

    @property
    def path(self) -> Path:
        return self.folder / "study.toml"

    @property
    def places(self) -> Places:
        return Places(self.folder / "records", self.folder / "runs", self.cache)

    @property
    def spec(self) -> Spec:
        return load_spec(self.path)

    def cell(self, variant: str) -> Cell:
        (found,) = self.spec.chosen(variants=[variant])
        return found

    def run(self, variant: str) -> Path:
        return self.places.run(self.cell(variant))

    def record(self, variant: str) -> Record:
        return load_record(self.places.record(self.cell(variant)))

    def records(self) -> set[str]:
        return {path.name for path in self.places.records.glob("*")}

    def busy(self, variant: str) -> bool:
        """Whether a process is at the cell."""
        with exclusive(self.run(variant) / "run", wait=False) as alone:
            return not alone

    def arguments(self, *more: str | Path) -> list[str]:
        folders = ["--runs", self.places.runs, "--cache", self.cache]
        return ["experiment", str(self.path), *map(str, folders), *map(str, more)]

    def call(self, *more: str | Path) -> Said:
        """Run it from this process."""
        return call(*self.arguments(*more))

    @contextmanager
    def started(self, *more: str | Path) -> Iterator[subprocess.Popen[str]]:
        """Run it from a process that can be killed, and is at the end, whatever becomes of the test."""
        command = [sys.executable, "-m", "attbalance_ext.cli", *self.arguments(*more)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            try:
                yield process
            finally:
                process.kill()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Look every few milliseconds; ``process`` must live until then."""
    deadline = time.monotonic() + 240
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


OF_THE_RUN = ("step_ms", "plain_step_ms", "seconds", "machine", "date")


def without_times(record: Record) -> dict[str, Any]:
    """What two runs of equal settings have in common."""
    plain = {name: value for name, value in vars(record).items() if name not in OF_THE_RUN}
    plain["curve"] = [{name: value for name, value in point.items() if name != "seconds"} for point in record.curve]
    return plain
