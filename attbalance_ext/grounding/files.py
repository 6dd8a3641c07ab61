"""Files that are whole or not there, and checkpoints that are data and never programs."""

from __future__ import annotations

import json
import os
import pickle
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import IO, Any

import torch

from attbalance_ext.grounding.errors import UserError

if sys.platform != "win32":
    import fcntl

FORMAT = 2
"""Raised when the layout of a checkpoint changes; files of another format are refused."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain types only) so that ``path`` holds the old state or the new one, whole."""
    replace_file(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU. Nothing in the file is executed: only tensors and plain types are accepted."""
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is refused: it holds more than tensors and plain values, or is damaged") from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint: {error or 'the file is empty'}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version (format {FORMAT})")
    return state


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    replace_file(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def replace_file(path: Path, write: Callable[[IO[bytes]], object], *, durable: bool = True) -> None:
    """Write a file under a temporary name of its own and rename it: others see the old file or the new one, whole.

    Several processes may do this at once; the last one's file stays. ``durable``: survive a power cut too, for files
    that cannot be made again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_beside(path) as (file, temporary):
        write(file)
        file.flush()
        if durable:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    if durable:
        _sync_directory(path.parent)


@contextmanager
def exclusive(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Be the only process inside for ``path``, which need not exist; gives True.

    ``wait``: until the others are out. Otherwise, where another is inside, the block runs all the same and is told
    False. A process that dies leaves, whatever it died of. Windows has no such lock: there everybody is alone.
    """
    if sys.platform == "win32":
        yield True
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def remove_unfinished(path: Path) -> None:
    """Remove what killed writers of ``path`` left beside it; nobody may be writing it now."""
    for temporary in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        temporary.unlink(missing_ok=True)


@contextmanager
def _temporary_beside(path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A temporary file in ``path``'s own directory (a rename is atomic only there), removed when anything fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file, temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_directory(directory: Path) -> None:
    """Make the rename itself survive a power cut; Windows has no such call."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
