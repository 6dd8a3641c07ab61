"""Who reads a host's attention: at most one at a time, so that nobody pays for another's hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar


class Watcher(Protocol):
    def remove(self) -> None:
        """Take the hooks off the host."""


W = TypeVar("W", bound=Watcher)


class Nobody:
    """The watcher of a host that is left alone."""

    def remove(self) -> None:
        pass


class Watch:
    """The one place of a host's watcher, shared by all providers of a case."""

    def __init__(self) -> None:
        self._current: Watcher = Nobody()

    def by(self, make: Callable[[], W]) -> W:
        """Let the last watcher go and put a new one on."""
        self._current.remove()
        watcher = make()
        self._current = watcher
        return watcher
