"""Files that are whole or not there, and checkpoints that are data and never programs."""

from __future__ import annotations

import errno
import json
import os
import pickle
import secrets
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import IO, Any

import torch

from attbalance_ext.grounding.errors import NotWritten, UserError

if sys.platform != "win32":
    import fcntl

FORMAT = 2
"""Raised when the layout of a checkpoint changes; files of another format are refused."""


_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""What a file system says that has no hard links."""
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What it says where it has no locks."""


def save_checkpoint(path: Path, state: dict[str, Any], *, keep: Path | None = None) -> None:
    """Write ``state`` (tensors and plain types only) so that ``path`` holds the old state or the new one, whole.

    ``keep``: where the old one stays.
    """

    def write(file: IO[bytes]) -> None:
        try:
            torch.save({"format": FORMAT, **state}, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # PyTorch speaks of a position in the file, and not of the cause
                raise error.__context__ from None
            raise

    replace_file(path, write, wanted=_bytes_of(state), keep=keep)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU. Nothing in the file is executed: only tensors and plain types are accepted.

    PyTorch writes checksums and never looks at them, so a flipped bit would be another weight: they are compared first.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"the checksum of {damaged} in it is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is refused: it holds more than tensors and plain values") from None
    except (zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged, cut short or no checkpoint: {error}") from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version (format {FORMAT})")
    return state


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8. Of names that are no text the bytes are written as escapes."""
    replace_file(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def replace_file(
    path: Path,
    write: Callable[[IO[bytes]], object],
    *,
    durable: bool = True,
    wanted: int | None = None,
    keep: Path | None = None,
) -> None:
    """Write a file under a temporary name of its own and rename it: others see the old file or the new one, whole.

    Several processes may do this at once; the last one's file stays. ``durable``: survive a power cut too, for files
    that cannot be made again. ``wanted``: about how many bytes it takes, for the message. ``keep``: another name, in
    the same folder, under which the old file stays.

    Raises:
        NotWritten: the disk is full, or the folder takes no file. The old file is whole, and nothing is left beside it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_beside(path) as (file, temporary):
            write(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                _keep(path, keep)
            os.replace(temporary, path)
        if durable:
            _sync_directory(path.parent)
    except OSError as error:
        raise NotWritten(f"{path} cannot be written: {_why(error, path.parent, wanted)}") from error


@contextmanager
def exclusive(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Be the only process inside for ``path``, which need not exist; gives True.

    ``wait``: until the others are out. Otherwise, where another is inside, the block runs all the same and is told
    False. A process that dies leaves, whatever it died of. Windows and some file systems of clusters have no such lock:
    there everybody is alone.

    Raises:
        NotWritten: the folder takes no file.
    """
    if sys.platform == "win32":
        yield True
        return
    with _lock_file(path) as file:
        yield _locked(file, wait)


def _lock_file(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path.with_name(f".{path.name}.lock"), "w")
    except OSError as error:
        raise NotWritten(f"{path} cannot be written: {_why(error, path.parent, None)}") from error


def _locked(file: IO[str], wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def remove_unfinished(path: Path) -> None:
    """Remove what killed writers of ``path`` left beside it; nobody may be writing it now."""
    for temporary in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        temporary.unlink(missing_ok=True)


def _keep(path: Path, name: Path) -> None:
    """Let the file at ``path`` have a second ``name``; where there are no hard links, the second alone."""
    second = _temporary_name(name)
    try:
        os.link(path, second)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.replace(path, name)
    else:
        os.replace(second, name)
        second.unlink(missing_ok=True)  # renaming does nothing where both are names of one file already


def _why(error: OSError, folder: Path, wanted: int | None) -> str:
    """What went wrong, in one line; of a full disk, by how much."""
    said = [error.strerror or str(error)]
    if wanted is not None:
        said.append(f"about {wanted / 2**20:.1f} MiB are wanted")
    if error.errno == errno.ENOSPC:
        said.append(f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB are free there")
    return ", ".join(said)


def _bytes_of(state: Any) -> int:
    """Of the memory behind the tensors in ``state``, which is nearly all of its file. What is shared counts once."""
    memory: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            memory[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (dict, list, tuple)):
            for part in value.values() if isinstance(value, dict) else value:
                look(part)

    look(state)
    return sum(memory.values())


@contextmanager
def _temporary_beside(path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A temporary file in ``path``'s own directory (a rename is atomic only there), removed when anything fails."""
    temporary = _temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            yield file, temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _sync_directory(directory: Path) -> None:
    """Make the rename itself survive a power cut; Windows has no such call."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
