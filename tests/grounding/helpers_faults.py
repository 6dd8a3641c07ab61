"""Faults, made on purpose: a disk that is full, a picture in the data that makes NaN, data in a few files."""

from __future__ import annotations

import ctypes
import errno
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from attbalance_ext.grounding import files

OPTIONS = ["--steps", "12", "--batch-size", "8", "--validate-every", "4", "--pretrain-steps", "0", "--rho", "ema"]
"""Of ``whole_run`` and of the runs that are to end like it."""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in ``folder``, hidden ones too, but for the lock and what TensorBoard writes."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".run.lock"}


class FullDisk:
    """From its ``time``-th writing on, the file called ``name`` finds room for ``room`` bytes alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, *, time: int = 1, room: int = 1000) -> None:
        self.name, self.time, self.room = name, time, room
        self.before: dict[str, bytes] = {}
        """What lay in the folder when the disk was found full."""
        monkeypatch.setattr(files, "open", self._open, raising=False)

    def _open(self, path: Path, mode: str, *arguments: Any) -> Any:
        if not path.name.startswith(f".{self.name}.") or not path.name.endswith(".tmp"):
            return open(path, mode, *arguments)
        self.time -= 1
        if self.time > 0:
            return open(path, mode, *arguments)
        self.before = contents(path.parent)
        return io.BufferedWriter(_Small(path, mode, self.room))


class _Small(io.FileIO):
    def __init__(self, path: Path, mode: str, room: int) -> None:
        super().__init__(path, mode)
        self.room = room

    def write(self, data: Any) -> int:
        """As a kernel does: what fits, and then an error."""
        fits = memoryview(data)[: self.room]
        if not fits:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(fits)
        return super().write(fits)


def write_own_data(root: Path, names: Sequence[str]) -> Path:
    """JSON lines about one picture of noise each; the last four are the split val."""
    root.mkdir(parents=True, exist_ok=True)
    records = []
    for number, name in enumerate(names):
        Image.effect_noise((64, 48), 50).convert("RGB").save(root / name, "JPEG")
        records.append(
            {"image": name, "sentence": f"the ball {number}", "bbox": [1, 1, 20, 20], "width": 64, "height": 48}
        )
    for split, part in (("train", records[:-4]), ("val", records[-4:])):
        (root / f"{split}.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in part))
    return root


@contextmanager
def without_override() -> Iterator[None]:
    """Root may read everything; without two of its capabilities it is a user like any other."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: twice 32 bits each
    assert libc.capget(header, sets) == 0
    before = sets[0]
    sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = before
        assert libc.capset(header, sets) == 0
