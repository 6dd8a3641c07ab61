"""Arrays kept on disk: whole or not there, checked when read, never a pickle."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..errors import NotWritten, UserError
from ..files import exclusive, replace_file
from .generate import Arrays

_log = logging.getLogger(__name__)

_ANOTHER = "give a folder by --cache or ATTBALANCE_CACHE"
_UNREADABLE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile)


def cache_directory(cache: Path | None = None) -> Path:
    """``cache`` if given, else ``$ATTBALANCE_CACHE``, else ``~/.cache/attbalance_ext``."""
    if given := cache or os.environ.get("ATTBALANCE_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "attbalance_ext"
    except RuntimeError:  # a container's user without a name
        raise UserError(f"the cache has no folder, for this user has no home: {_ANOTHER}") from None


def load_or_create(path: Path, create: Callable[[], Arrays]) -> Arrays:
    """Read the arrays at ``path``; where there are none, or they are damaged, create and store them.

    Raises:
        NotWritten: the folder takes no files.
    """
    with suppress(*_UNREADABLE):  # without the lock: a cache that is complete may be read-only
        return _read(path)
    try:
        return _create(path, create)
    except NotWritten as error:
        raise NotWritten(f"{error}: {_ANOTHER}") from error


def _create(path: Path, create: Callable[[], Arrays]) -> Arrays:
    with exclusive(path):  # of several processes one creates, and the others read
        if path.exists():
            try:
                return _read(path)
            except _UNREADABLE as error:
                _log.warning("%s is damaged (%s): generating it again", path, error or type(error).__name__)
        arrays = create()
        replace_file(path, lambda file: np.savez(file, allow_pickle=False, **arrays), durable=False)
        return arrays


def _read(path: Path) -> Arrays:
    """Every array in full: the archive's checksums are compared while reading."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
