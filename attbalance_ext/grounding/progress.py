"""Progress bars in one style."""

from __future__ import annotations

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from attbalance_ext.grounding.console import messages


def progress_bars(*, show: bool = True) -> Progress:
    """Bars with a name, a count, the time gone and left, and a free ``note``; on stderr: results can be piped."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=messages(),
        disable=not show,
    )
