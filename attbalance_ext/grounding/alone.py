"""One process at a time trains in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from attbalance_ext.grounding.files import exclusive


class _Hold:
    """This process's lock of one folder."""

    def __init__(self) -> None:
        self.lock = ExitStack()
        self.users = 0


_held: dict[str, _Hold] = {}
"""By the folder's real path."""


@contextmanager
def alone_in(directory: Path) -> Iterator[bool]:
    """Be the only process that trains in ``directory``; the block is told False where another one does.

    A process may enter again what it holds: a study's worker is in the folder before its run is. A process that dies
    leaves, and so does what it forked; the file of the lock, ``.run.lock``, stays and means nothing.
    """
    key = os.path.realpath(directory)
    hold = _held.get(key)
    if hold is None:
        hold = _Hold()
        try:
            alone = hold.lock.enter_context(exclusive(directory / "run", wait=False))
        except OSError:  # it takes no files at all: the first one of the run says so
            alone = True
        if not alone:
            hold.lock.close()
            yield False
            return
        _held[key] = hold
    hold.users += 1
    try:
        yield True
    finally:
        hold.users -= 1
        if not hold.users:
            _held.pop(key, None)
            hold.lock.close()


def _leave_to_parent() -> None:
    """A lock lasts as long as any process has its file open: one that reads images would keep it for seconds after the
    trainer was killed."""
    for hold in _held.values():
        hold.lock.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
