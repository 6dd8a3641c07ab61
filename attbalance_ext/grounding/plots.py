"""What every picture by matplotlib has in common: its colours and marks, and how it becomes an SVG.

A figure is never matplotlib's global state, which is the caller's.
"""

from __future__ import annotations

import io
from importlib import import_module
from typing import TYPE_CHECKING, Any

from attbalance_ext.grounding.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's, which the colour-blind can tell apart, without the yellow, which paper swallows."""
MARKERS = ("o", "s", "^", "D", "v", "P")
"""For print without colours. Of another number than the colours: 42 lines differ."""
_SVG: Any = {"svg.fonttype": "none", "svg.hashsalt": "attbalance"}


def require_matplotlib() -> None:
    """Refuse before any time is spent."""
    try:
        import_module("matplotlib")
    except ModuleNotFoundError as error:
        raise UserError(f"the picture needs {error.name!r}: pip install 'attbalance_ext[train]'") from None


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def as_svg(figure: Figure) -> str:
    """The file's text. What is written stays text: smaller, and it can be searched. Same figure, same bytes."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context(_SVG):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
