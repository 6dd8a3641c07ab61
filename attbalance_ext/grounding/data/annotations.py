"""One sentence, the picture it is about and the box it means: what every file format is read into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

_LARGEST_SIDE = 2**31
"""No image has as many pixels in a row. JSON's integers have no end; the numbers that a box is compared with have."""


class Box(NamedTuple):
    """Corners in pixels of the image file. x grows to the right, y downwards; x2 and y2 are not inside."""

    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class Annotation:
    image: Path
    sentence: str
    box: Box
    size: tuple[int, int] | None = None
    """(width, height) of the image in pixels, where the format says it."""


def parse_box(values: Any, *, corners: bool) -> Box:
    """A file's four numbers, [x1, y1, x2, y2] for ``corners``, else [x1, y1, width, height], as a box in float64.

    Raises ``ValueError`` where they are not four numbers. They may be wrong numbers: see ``wrong_boxes``.
    """
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or len(values) != 4:
        raise ValueError(f"a box is four numbers, not {_short(values)}")
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise ValueError(f"a box is four numbers, not {_short(values)}")
    try:
        x1, y1, third, fourth = map(float, values)
    except OverflowError:
        raise ValueError(f"a box's numbers are too large: {_short(values)}") from None
    return Box(x1, y1, third, fourth) if corners else Box(x1, y1, x1 + third, y1 + fourth)


def parse_text(value: Any, what: str) -> str:
    """A sentence or a file's name; raises ``ValueError`` where it is not text. Bytes are read as UTF-8."""
    if isinstance(value, bytes):
        return value.decode()
    if not isinstance(value, str):
        raise ValueError(f"{what} is text, not {_short(value)}")
    return value


def parse_size(width: Any, height: Any) -> tuple[int, int]:
    """An image's size in pixels; raises ``ValueError`` where it is not two positive integers that an image can have."""
    for value in (width, height):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"an image's width and height are integers above 0, not {_short(value)}")
        if value >= _LARGEST_SIDE:
            raise ValueError(f"an image's width and height are below {_LARGEST_SIDE}, not {_short(value)}")
    return width, height


def _short(value: Any) -> str:
    """What came, in a few characters; containers by their type, for they may be nested without end."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return f"{type(value).__name__} of {len(value)}: {', '.join(_short_item(item) for item in value[:4])}"
    return _short_item(value)


def _short_item(value: Any) -> str:
    return repr(value)[:60] if isinstance(value, str | bytes | int | float | None) else type(value).__name__
