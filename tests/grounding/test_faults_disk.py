"""A full disk: what was there stays whole, nothing is left beside it, and the run goes on once there is room."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers_command import Command, assert_same_end, call, history
from helpers_faults import OPTIONS, FullDisk, contents

from attbalance_ext.grounding.data.generate import SCENES
from attbalance_ext.grounding.files import load_checkpoint
from attbalance_ext.grounding.train import LAST, PREVIOUS

SHORT = [*OPTIONS, "--steps", "2"]
pytestmark = pytest.mark.usefixtures("few_scenes")


@pytest.mark.parametrize(("name", "saved"), [("last.pt", 4), ("settings.json", 4), ("history.json", 4)])
def test_disk_full_while_a_run_is_saved(
    name: str,
    saved: int,
    whole_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At the checkpoint of step 8. Settings and history are written with best.pt too, and settings at the start."""
    run = tmp_path / "run"
    times = {"last.pt": 2, "settings.json": 4, "history.json": 3}
    with monkeypatch.context() as patch:
        disk = FullDisk(patch, name, time=times[name], room=30)
        assert call("train", "--out", run, *OPTIONS) == 1
    said = capsys.readouterr().err
    last_line = said.splitlines()[-1]
    assert last_line.startswith(f"attbalance: {run / name} cannot be written: No space left on device, ")
    assert " MiB are free there" in last_line
    assert "Traceback" not in said
    assert f"The last good state: {run / LAST} of step {saved}; go on with: attbalance train --resume {run}" in said
    assert contents(run) == disk.before
    assert name in disk.before
    if name == "last.pt":
        assert "about 4.3 MiB are wanted" in last_line

    assert call("train", "--resume", run) == 0
    assert_same_end(run, whole_run)


def test_disk_full_at_the_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        FullDisk(patch, "best.pt")
        assert call("train", "--out", run, *OPTIONS) == 1
    assert "No space left on device" in (said := capsys.readouterr().err)
    assert "Nothing was saved yet" in said
    assert list(contents(run)) == ["settings.json"]


SMALL_DISK = """
import os, shutil, sys
sys.path[:0] = {path}
from attbalance_ext.grounding.data.generate import SCENES
SCENES.update({{"train": 80, "val": 12, "test": 16, "test_novel": 4}})
from helpers_command import call
assert call("train", "--out", "{disk}/run", *{options}) == 1
assert not [name for name in os.listdir("{disk}/run") if name.endswith(".tmp")]
assert os.system("mount -o remount,size=64m {disk}") == 0
assert call("train", "--resume", "{disk}/run") == 0
shutil.copytree("{disk}/run", "{out}")
"""


def test_disk_full_for_real(whole_run: Path, tmp_path: Path, cache: Path) -> None:
    """A file system in memory that has room for one checkpoint and not for two; then it is enlarged."""
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    in_namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = ["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", str(disk)]
    if shutil.which("unshare") is None or subprocess.run([*in_namespace, *mount], capture_output=True).returncode:
        pytest.skip("mounting a file system of one's own is not allowed here")
    script = SMALL_DISK.format(path=[*sys.path], disk=disk, out=out, options=OPTIONS)
    command = Command(tmp_path, cache)
    found = subprocess.run(
        [*in_namespace, "sh", "-c", f'{" ".join(mount)} && exec "$0" -c "$1"', sys.executable, script],
        env=command.environment,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert f"{disk / 'run' / LAST} cannot be written: No space left on device, about 4.3 MiB are wanted" in found.stderr
    assert_same_end(out, whole_run)


@pytest.mark.parametrize("moment", ["folder", "add_scalar", "close"])
def test_disk_full_for_tensorboard_alone(
    moment: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The same records are in the checkpoint: the run says so and goes on."""
    run = tmp_path / "run"
    if moment == "folder":
        run.mkdir()
        (run / "tensorboard").write_text("")
    else:

        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        from torch.utils.tensorboard import SummaryWriter

        monkeypatch.setattr(SummaryWriter, moment, full)
    with caplog.at_level(logging.WARNING):
        assert call("train", "--out", run, *SHORT) == 0
    (warning,) = [each.getMessage() for each in caplog.records if "tensorboard" in each.getMessage()]
    assert warning.startswith(f"{run / 'tensorboard'} is no longer written (")
    assert warning.endswith("the records go on in history.json")
    assert [record["step"] for record in history(run)["train"]] == [2]


def test_disk_full_for_generated_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SCENES, "train", 2)
    (name,) = [each.name for each in _generated(tmp_path / "roomy")]
    with monkeypatch.context() as patch:
        FullDisk(patch, name)
        assert call("train", "--out", tmp_path / "run", "--cache", tmp_path / "full", *OPTIONS) == 1
    assert f"{tmp_path / 'full' / name} cannot be written: No space left on device" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir() if not path.name.endswith(".lock")] == []


def _generated(cache: Path) -> list[Path]:
    from attbalance_ext.grounding.data import load_dataset

    load_dataset("builtin:refcoco", "train", cache=cache, progress=False)
    return [*cache.glob("*.npz")]


@pytest.mark.parametrize("out", ["a-file", "a-file/run"])
def test_a_folder_that_takes_no_files_is_met_before_the_training(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a-file").write_text("mine")
    assert call("train", "--out", tmp_path / out, *OPTIONS) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"attbalance: {tmp_path / out / 'settings.json'} cannot be written: " in said
    assert (tmp_path / "a-file").read_text() == "mine"


def test_without_hard_links_the_checkpoint_before_the_last_is_kept_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    run = tmp_path / "run"
    assert call("train", "--out", run, *SHORT, "--checkpoint-every", "1") == 0
    assert [load_checkpoint(run / name)["step"] for name in (LAST, PREVIOUS)] == [2, 1]
    assert not list(run.glob(".*.tmp"))
