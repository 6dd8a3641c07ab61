"""Where people read. Names and paths are printed as they are: `[/x]` and `:cat:` in them mean nothing."""

from __future__ import annotations

from rich.console import Console


def output() -> Console:
    """Results: they can be piped."""
    return _plain(stderr=False)


def messages() -> Console:
    """What is said beside the results."""
    return _plain(stderr=True)


def _plain(*, stderr: bool) -> Console:
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)
