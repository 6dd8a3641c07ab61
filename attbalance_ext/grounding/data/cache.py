"""Arrays kept on disk: whole or not there, checked when read, never a pickle."""

from __future__ import annotations

import logging
import os
import secrets
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from .generate import Arrays

_log = logging.getLogger(__name__)


def cache_directory(cache: Path | None = None) -> Path:
    """``cache`` if given, else ``$ATTBALANCE_CACHE``, else ``~/.cache/attbalance_ext``."""
    return Path(cache or os.environ.get("ATTBALANCE_CACHE") or Path.home() / ".cache" / "attbalance_ext")


def load_or_create(path: Path, create: Callable[[], Arrays]) -> Arrays:
    """Read the arrays at ``path``; where there are none, or they are damaged, create and store them."""
    if path.exists():
        try:
            return _read(path)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            _log.warning("%s is damaged (%s): generating it again", path, error or type(error).__name__)
    arrays = create()
    replace_file(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
    return arrays


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file under a temporary name of its own and rename it: others see the old file or the new one, whole.

    Two processes may do this at once; the last one's file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file by ``text`` in UTF-8."""
    replace_file(path, lambda file: file.write(text.encode()))


def _read(path: Path) -> Arrays:
    """Every array in full: the archive's checksums are compared while reading."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
