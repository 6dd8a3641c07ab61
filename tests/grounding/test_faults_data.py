"""A run goes on with the data that it began with, and says so where they have changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_command import assert_same_end, call
from helpers_faults import OPTIONS, contents, write_own_data

from attbalance_ext.grounding.data import load_dataset
from attbalance_ext.grounding.data.content import content
from attbalance_ext.grounding.data.files import open_dataset
from attbalance_ext.grounding.data.generate import SCENES
from attbalance_ext.grounding.files import load_checkpoint, save_checkpoint
from attbalance_ext.grounding.train import LAST, PREVIOUS

OWN = ["--steps", "4", "--batch-size", "4", "--validate-every", "2", "--pretrain-steps", "0"]
NAMES = [f"{number:02}.jpg" for number in range(20)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_own_data(tmp_path / "data", NAMES)


def change(name: str, value: object) -> Callable[[list[str]], list[str]]:
    """Another value in the last line."""
    return lambda lines: [*lines[:-1], json.dumps({**json.loads(lines[-1]), name: value}) + "\n"]


CHANGES: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "fewer sentences": (lambda lines: lines[:-3], "({} sentences then, {} now)"),
    "another sentence": (change("sentence", "a cat"), "({} sentences, but not the same ones)"),
    "another box": (change("bbox", [1, 1, 20, 21]), "({} sentences, but not the same ones)"),
    "another picture": (change("image", NAMES[0]), "({} sentences, but not the same ones)"),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", CHANGES)
def test_other_data_are_refused(
    kind: str, split: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = tmp_path / "run", root / f"{split}.jsonl"
    assert call("train", "--data", "own", "--data-root", root, "--out", run, *OWN) == 0
    shutil.copy(run / PREVIOUS, run / LAST)  # as it was after step 2
    lines = file.read_text().splitlines(keepends=True)
    edit, how = CHANGES[kind]
    file.write_text("".join(edit(lines)))
    before = contents(run)
    capsys.readouterr()
    assert call("train", "--resume", run) == 2
    assert capsys.readouterr().err == (
        f"attbalance: own {split} is not what it was when {run / LAST} was written "
        f"{how.format(len(lines), len(lines) - 3)}; put the old data back, or start a new run\n"
    )
    assert contents(run) == before
    file.write_text("".join(reversed(lines)))  # the order of the lines is no content
    assert call("train", "--resume", run) == 0
    assert load_checkpoint(run / LAST)["step"] == 4


@pytest.mark.usefixtures("few_scenes")
def test_other_built_in_data_are_refused(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(whole_run, tmp_path / "run"))
    monkeypatch.setitem(SCENES, "val", 11)
    assert call("train", "--resume", run) == 2
    assert "builtin:refcoco val is not what it was when " in capsys.readouterr().err


@pytest.mark.usefixtures("few_scenes")
def test_a_checkpoint_of_before_the_data_were_noted_down_goes_on(whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call("train", "--out", run, *OPTIONS) == 0
    state = load_checkpoint(run / PREVIOUS)
    del state["data"], state["format"]
    save_checkpoint(run / LAST, state)
    assert call("train", "--resume", run) == 0
    assert_same_end(run, whole_run)


def test_content_is_the_same_wherever_the_files_lie(root: Path, tmp_path: Path) -> None:
    other = shutil.copytree(root, tmp_path / "other")
    first, second = (content(open_dataset("own", "train", root=folder)) for folder in (root, other))
    assert first == second
    assert first["sentences"] == 16


@pytest.mark.usefixtures("few_scenes")
def test_pixels_are_content_where_they_are_in_memory() -> None:
    data = load_dataset("builtin:refcoco", "val", progress=False)
    before = content(data)
    data.images[-1, 0, 0, 0] ^= 1
    assert content(data) != before
