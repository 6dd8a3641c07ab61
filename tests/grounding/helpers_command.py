"""The command line, in this process or in ones of its own, on a few scenes of the built-in data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import attbalance_ext
from attbalance_ext import cli
from attbalance_ext.grounding.files import load_checkpoint

FEW_SCENES = {"train": 80, "val": 12, "test": 16, "test_novel": 4}
LAUNCH = f"""
from attbalance_ext.grounding.data.generate import SCENES
SCENES.update({FEW_SCENES})
PRELUDE
from attbalance_ext.cli import main
main()
"""


def call(*arguments: str | Path) -> int:
    """Run the command line in this process; gives back its exit code."""
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(sys, "argv", ["attbalance", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


class Command:
    """Starts ``attbalance``, alone or under ``torchrun``; every process has one thread.

    ``prelude``: code that each process runs first; ``environment``: more of it.
    """

    def __init__(
        self, folder: Path, cache: Path, *, prelude: str = "", environment: dict[str, str] | None = None
    ) -> None:
        self.script = folder / "launch.py"
        self.script.write_text(LAUNCH.replace("PRELUDE", prelude))
        hidden = {"TRITON_INTERPRET", "ATTBALANCE_BACKEND"}
        self.environment = {name: value for name, value in os.environ.items() if name not in hidden}
        self.environment |= {"ATTBALANCE_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.environment["PYTHONPATH"] = str(Path(attbalance_ext.__file__).parent.parent)  # what is tested here
        self.environment |= environment or {}

    def start(self, *arguments: str | Path, processes: int = 1) -> subprocess.Popen[str]:
        launcher: list[str] = []
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        return subprocess.Popen(
            [sys.executable, *launcher, str(self.script), *map(str, arguments)],
            env=self.environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )

    def run(self, *arguments: str | Path, processes: int = 1, expect: int = 0) -> str:
        """What it said on stderr; any other exit status than ``expect`` fails the test."""
        process = self.start(*arguments, processes=processes)
        _, said = process.communicate(timeout=240)
        assert process.returncode == expect, said
        return said


def history(run: Path) -> dict[str, list[dict[str, Any]]]:
    """A run's records, without the times."""
    records = json.loads((run / "history.json").read_text())
    return {
        kind: [{name: value for name, value in record.items() if name != "step_ms"} for record in found]
        for kind, found in records.items()
    }


def assert_same_end(run: Path, other: Path) -> None:
    """The same records and bits: whatever befell one of the two, nothing was lost."""
    assert history(run) == history(other)
    ends = [load_checkpoint(each / "last.pt") for each in (run, other)]
    assert ends[0]["step"] == ends[1]["step"]
    for part in ("model", "teacher", "criterion"):
        first, second = (end[part] for end in ends)
        assert (first is None) == (second is None)
        for name in first or ():
            assert torch.equal(first[name], second[name]), name
