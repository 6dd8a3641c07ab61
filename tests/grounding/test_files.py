"""Checkpoints are whole or not there, and never programs. One process at a time is inside ``exclusive``."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import runpy
import sys
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch

from attbalance_ext.grounding import files
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.files import exclusive, load_checkpoint, save_checkpoint


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.pt"
    save_checkpoint(path, {"weights": torch.arange(3.0), "name": "x", "nested": [{"a": 1.5, "none": None}]})
    state = load_checkpoint(path)
    assert torch.equal(state["weights"], torch.arange(3.0))
    assert state["nested"] == [{"a": 1.5, "none": None}]


@pytest.mark.parametrize("moment", ["write", "sync", "rename"])
def test_a_failure_leaves_the_old_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"step": 1})

    def write_half(state: object, file: object) -> None:
        file.write(b"half a checkpoint")  # type: ignore[attr-defined]
        raise OSError("no space left on device")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    target = {"write": (files.torch, "save", write_half), "sync": (files.os, "fsync", fail)}
    monkeypatch.setattr(*target.get(moment, (files.os, "replace", fail)))
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(path, {"step": 2})
    monkeypatch.undo()
    assert load_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == ["a.pt"]


class Hostile:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_hostile_checkpoint_runs_nothing(tmp_path: Path, writer: str) -> None:
    path, proof = tmp_path / "evil.pt", tmp_path / "proof"
    state = {"format": files.FORMAT, "model": Hostile(proof)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path)
    with pytest.raises(UserError, match=r"evil\.pt"):
        load_checkpoint(path)
    assert not proof.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 truncated zip"])
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.pt"):
        load_checkpoint(path)


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    save_checkpoint(path, {"weights": torch.randn(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"cut\.pt"):
        load_checkpoint(path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"format": files.FORMAT + 1}, path)
    with pytest.raises(UserError, match="not a checkpoint of this version"):
        load_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_checkpoint_is_refused_and_never_crashes(tmp_path: Path) -> None:
    """Each byte of the pickle in it, changed: what is found is a state or a ``UserError``."""
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"weights": torch.arange(3.0), "name": "x", "nested": [{"a": 1.5, "none": None}]})
    whole = path.read_bytes()
    start = whole.index(b"\x80\x02}q")
    refused = 0
    for place in range(start, whole.index(b".PK", start)):
        for change in (0x55, 0xFF):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
            try:
                load_checkpoint(path)
            except UserError:
                refused += 1
    assert refused > 100


# --- one process at a time --------------------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")


class Holder:
    """Another process that goes inside and stays there until it is told to leave."""

    def __init__(self, path: Path, *, wait: bool = True) -> None:
        self.said, saying = FORK.Pipe(duplex=False)
        self.leave = FORK.Event()
        self.process = FORK.Process(target=self.hold, args=(path, wait, saying, self.leave), daemon=True)
        self.process.start()

    @staticmethod
    def hold(path: Path, wait: bool, saying: Connection, leave: Event) -> None:
        with exclusive(path, wait=wait) as alone:
            saying.send(alone)
            leave.wait(60)

    def inside(self, seconds: float = 30.0) -> bool:
        """Whether it came inside, or to the block, within some time."""
        return self.said.poll(seconds)

    def end(self) -> None:
        self.leave.set()
        self.process.join(30)
        assert self.process.exitcode == 0


def test_the_second_process_waits_for_the_first(tmp_path: Path) -> None:
    first = Holder(tmp_path / "x")
    assert first.inside()
    second = Holder(tmp_path / "x")
    other = Holder(tmp_path / "y")
    assert other.inside()
    assert not second.inside(0.3)
    first.end()
    assert second.inside()
    assert first.said.recv() is second.said.recv() is True
    for holder in (second, other):
        holder.end()


def test_who_does_not_wait_is_told(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x"
    holder = Holder(path)
    assert holder.inside()
    for _ in range(2):  # being told no takes nothing from the one inside
        with exclusive(path, wait=False) as alone:
            assert not alone
    holder.end()
    with exclusive(path, wait=False) as alone:
        assert alone
        visitor = Holder(path, wait=False)
        assert visitor.inside()
        assert visitor.said.recv() is False
        visitor.end()
    assert not path.exists()


def test_a_killed_process_is_no_longer_inside(tmp_path: Path) -> None:
    holder = Holder(tmp_path / "x")
    assert holder.inside()
    holder.process.kill()
    holder.process.join(30)
    with exclusive(tmp_path / "x", wait=False) as alone:
        assert alone


@pytest.mark.parametrize("error", [KeyboardInterrupt, BlockingIOError])
def test_who_fails_inside_leaves(error: type[BaseException], tmp_path: Path) -> None:
    def fail(*, alone: bool) -> None:
        with exclusive(tmp_path / "x", wait=False) as found:
            assert found == alone
            raise error

    with pytest.raises(error):
        fail(alone=True)
    with exclusive(tmp_path / "x", wait=False) as alone:
        assert alone
        with pytest.raises(error):
            fail(alone=False)


def test_where_there_are_no_locks_files_still_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    module = runpy.run_path(files.__file__)
    monkeypatch.undo()
    monkeypatch.setattr(sys, "platform", "win32")
    with module["exclusive"](tmp_path / "x", wait=False) as alone:
        assert alone
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_everybody_is_alone(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    for wait in (True, False):
        with exclusive(tmp_path / "x", wait=wait) as alone:
            assert alone
