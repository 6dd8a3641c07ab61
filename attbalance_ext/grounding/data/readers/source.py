"""What every reader offers: which splits lie here, where a missing one would be, and the annotations of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from attbalance_ext.grounding.errors import UserError

from ..annotations import Annotation

T = TypeVar("T")


class Source(ABC):
    """One data set in one format. Making one reads nothing."""

    format: str
    name: str
    usual: tuple[str, ...]
    """The splits that the data set has where it is whole."""

    @abstractmethod
    def splits(self) -> list[str]:
        """The splits that can be read, in the usual order. Contents are not looked at more than needed."""

    @abstractmethod
    def expected(self, split: str) -> Path:
        """The file that would hold ``split``: the one that is there, or where it should be."""

    @abstractmethod
    def read(self, split: str) -> list[Annotation]:
        """The annotations of ``split``, as the files have them.

        Raises ``UserError`` that names the file where one is missing, damaged or of another shape.
        """


def read_rows(path: Path, rows: Iterable[Any], read: Callable[[Any], T]) -> list[T]:
    """``read`` of each row; a row of another shape is a ``UserError`` with its number, counted from 0."""
    found: list[T] = []
    try:
        for row in rows:
            found.append(read(row))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: entry {len(found)} cannot be used: {reason}") from None
    return found


def image_folder(folders: Sequence[Path], first: str) -> Path:
    """The folder that holds the image ``first``; where none does, the first one that exists, else the first."""
    for folder in folders:
        if (folder / first).is_file():
            return folder
    return next((folder for folder in folders if folder.is_dir()), folders[0])
