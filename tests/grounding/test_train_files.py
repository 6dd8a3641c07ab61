"""A data set in files trains, evaluates and reports the same numbers whichever format it was read from."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_command import call

from attbalance_ext.grounding.data import FORMATS, export
from attbalance_ext.grounding.files import load_checkpoint

SMALL = ["--steps", "6", "--batch-size", "8", "--validate-every", "3", "--pretrain-steps", "2", "--augment"]
NAMES = {"split-files": "unc", "refer": "refcoco", "jsonl": "own"}

pytestmark = pytest.mark.usefixtures("few_scenes")


def without_names(records: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in records.items() if name not in ("run", "split", "step_ms")}


def test_three_formats_give_the_same_numbers(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for format in FORMATS:
        root = tmp_path / f"dàta {format}"
        export("builtin:refcoco", root, format, cache=cache, progress=False)
        run = tmp_path / format
        assert call("train", "--data", NAMES[format], "--data-root", root, "--out", run, *SMALL) == 0
        history = json.loads((run / "history.json").read_text())
        evaluations = []
        tests = ("testA", "testB") if format != "jsonl" else ("test", "test_novel")
        for split in ("val", *tests):
            capsys.readouterr()
            assert call("eval", run, "--split", split, "--json") == 0
            evaluations.append(without_names(json.loads(capsys.readouterr().out)))
        assert call("report", run, "--split", "val", "--out", tmp_path / f"{format}.html") == 0
        found[format] = {
            "records": {kind: [*map(without_names, records)] for kind, records in history.items()},
            "evaluations": evaluations,
        }
    first, *others = found.values()
    assert all(other == first for other in others)
    assert first["evaluations"][0]["samples"] > 10


def test_sentences_are_as_long_as_asked_for(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call("train", "--out", run, "--max-words", "4", *SMALL) == 0
    assert len(load_checkpoint(run / "last.pt")["model"]["text_positions"]) == 4
    assert call("eval", run, "--split", "val") == 0


class Mischief:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("format", ["split-files", "refer", "checkpoint"])
def test_a_hostile_pickle_runs_nothing(
    format: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In place of a split file, of refs.p and of a checkpoint."""
    trap = tmp_path / "trap"
    if format == "checkpoint":
        run = tmp_path / "run"
        run.mkdir()
        torch.save({"format": 2, "model": Mischief(trap)}, run / "last.pt")
        commands: list[list[str | Path]] = [["train", "--resume", run], ["eval", run], ["report", run]]
        named = "last.pt"
    else:
        folder = export("builtin:refcoco", tmp_path / "root", format, cache=cache, progress=False)
        named = "unc_train.pth" if format == "split-files" else "refs(unc).p"
        if format == "refer":
            (folder / named).write_bytes(pickle.dumps([Mischief(trap)]))
        else:
            torch.save([Mischief(trap)], folder / named, _use_new_zipfile_serialization=False)
        commands = [["train", "--data", NAMES[format], "--data-root", tmp_path / "root", "--out", tmp_path / "run"]]
    for command in commands:
        assert call(*command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert named in error
        assert not trap.exists()
    pickle.loads(pickle.dumps(Mischief(trap)))
    assert trap.exists(), "the pickle was harmless, so nothing was proven"
