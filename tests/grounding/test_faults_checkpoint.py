"""A checkpoint that is corrupt, cut short or lost is refused by its name; the one before it is offered, never taken."""

from __future__ import annotations

import shlex
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_command import assert_same_end, call
from helpers_faults import contents

from attbalance_ext.grounding.files import load_checkpoint, save_checkpoint
from attbalance_ext.grounding.train import BEST, HISTORY, LAST, PREVIOUS

pytestmark = pytest.mark.usefixtures("few_scenes")


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> Path:
    """A run of its own: last.pt is of step 12, previous.pt of step 8."""
    return Path(shutil.copytree(whole_run, tmp_path / "a run"))


def flip_a_bit(path: Path) -> None:
    """In the middle of the largest tensor: all that shows of it is another weight."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 0x10
    path.write_bytes(content)


def cut(share: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * (path.stat().st_size - 1))])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip_a_bit,
    "the last byte lost": cut(1.0),
    "half of it lost": cut(0.5),
    "empty": cut(0.0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "lost": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint(damage: str, run: Path, whole_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DAMAGES[damage](run / LAST)
    before = contents(run)
    capsys.readouterr()
    assert call("train", "--resume", run) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(run / LAST) in said
    assert "is whole, of step 8; go on with: attbalance train --resume " in said
    assert call("eval", run / LAST) == 2
    assert str(run / LAST) in capsys.readouterr().err
    assert contents(run) == before, "nothing was changed"
    if damage != "a flipped bit":
        return
    _, *arguments = shlex.split(said.partition("go on with: ")[2])
    assert call(*arguments) == 0
    assert_same_end(run, whole_run)
    assert load_checkpoint(run / PREVIOUS)["step"] == 8, "the damaged file took no place of a whole one"


def test_what_is_damaged_too_is_not_offered(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (LAST, PREVIOUS):
        flip_a_bit(run / name)
    assert call("train", "--resume", run) == 2
    said = capsys.readouterr().err
    assert "the checksum of " in said
    assert PREVIOUS not in said


def test_a_run_without_its_last_checkpoint_is_not_written_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / LAST).unlink()
    before = contents(run)
    assert call("train", "--out", run) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert contents(run) == before


@pytest.mark.parametrize("left", [LAST, PREVIOUS, BEST])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_run_of_which_one_file_is_left_is_not_written_over(
    left: str, dangling: bool, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in {LAST, PREVIOUS, BEST} - {left}:
        (run / name).unlink()
    if dangling:  # its file lies on a disk that is not there at present
        (run / left).unlink()
        (run / left).symlink_to("elsewhere.pt")
    before = contents(run)
    assert call("train", "--out", run) == 2
    said = capsys.readouterr().err
    assert f"{run} already holds a run ({left}); " in said
    assert ("continue it with --resume" in said) == (left != BEST)
    assert contents(run) == before
    assert (run / left).is_symlink() == dangling


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an empty optimizer": (lambda state: state.update(optimizer={}), "it has no 'param_groups'"),
    "no teacher": (lambda state: state.pop("teacher"), "it has no 'teacher'"),
    "no schedule": (lambda state: state.pop("scheduler"), "it has no 'scheduler'"),
    "no data": (lambda state: state.update(data=5), "'int' object has no attribute"),
    "no records": (lambda state: state.update(log={}), "it has no 'history'"),
    "records of nothing": (lambda state: state["log"].update(history={"train": 5}), "no list of train records"),
    "a tensor for a model": (lambda state: state.update(model=torch.ones(3)), "TypeError: "),
    "an unknown option": (lambda state: state["settings"].update(model_options={"foo": 1}), "'foo'"),
    "a word for a seed": (lambda state: state["settings"].update(seed="x"), "settings that cannot be used: "),
    "a word twice": (lambda state: state["tokenizer"]["words"].append("the"), "some word is listed twice"),
    "a word for a step": (lambda state: state.update(step="x"), "its step is 'x'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_checkpoint_of_the_right_format_with_something_else_in_it(
    wrong: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_checkpoint(run / LAST)
    change, says = WRONG[wrong]
    change(state)
    del state["format"]
    save_checkpoint(run / LAST, state)
    before = contents(run)
    capsys.readouterr()
    assert call("train", "--resume", run) == 2
    said = [capsys.readouterr().err]
    if wrong not in ("an empty optimizer", "no teacher", "no schedule", "no data"):  # of which it reads nothing
        (run / HISTORY).rename(run / "history")
        assert call("eval", run / LAST, "--split", "val") == 2
        said.append(capsys.readouterr().err)
        (run / "history").rename(run / HISTORY)
    for error in said:
        assert error.startswith(f"attbalance: {run / LAST} does not hold a run of this version: ")
        assert says in error
        assert error.count("\n") == 1
    assert contents(run) == before


def test_a_damaged_best_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is not replaced by the last one, which is another model."""
    flip_a_bit(run / BEST)
    assert call("eval", run) == 2
    assert f"{run / BEST} is damaged" in capsys.readouterr().err
    assert call("train", "--resume", run / BEST) == 2
    assert call("eval", run / LAST, "--split", "val") == 0


NO_TIME = '{"train": [{"step": 1, "box": 1.0}], "validation": []}'


@pytest.mark.parametrize("content", ["", '{"train": [', "[]", "\udcff", '{"train": 5}', '{"train": null}', NO_TIME])
def test_a_damaged_history(content: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / HISTORY).write_bytes(content.encode(errors="surrogateescape"))
    for command in ("eval", "report"):
        assert call(command, run, "--split", "val") == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"{run / HISTORY} is damaged" in said
    (run / HISTORY).unlink()
    assert call("eval", run, "--split", "val") == 0


def test_the_best_checkpoint_cannot_be_trained_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--resume", run / BEST) == 2
    assert f"{run / BEST} is not a run's checkpoint: it has no optimizer" in capsys.readouterr().err
