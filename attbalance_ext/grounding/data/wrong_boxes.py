"""Boxes that cannot be right: found, counted, named, and skipped or repaired."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from attbalance_ext.grounding.errors import UserError

from .annotations import Annotation, Box

KINDS = ("not finite", "inverted", "empty", "outside")
"""A number that is infinite or none; x2 < x1 or y2 < y1; no width or height; over the edge of the image."""
CHOICES = ("skip", "repair", "error")
TOLERANCE = 1.0
"""Pixels by which a box may be over the edge. Real data are rounded, or count the last pixel as inside: such a box is
clipped and is not wrong."""
_EXAMPLES = 3


@dataclass
class WrongBoxes:
    """What was found among the annotations of a split."""

    counts: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    examples: list[str] = field(default_factory=list)
    """The first few, each with its image and sentence."""

    @property
    def total(self) -> int:
        return self.counts.total()

    def __str__(self) -> str:
        kinds = ", ".join(f"{self.counts[kind]} {kind}" for kind in KINDS if self.counts[kind])
        treated = f"{self.skipped} skipped, {self.total - self.skipped} repaired"
        return f"{self.total} wrong boxes ({kinds}; {treated}), as {'; '.join(self.examples)}"


def kind_of(box: Box, size: tuple[int, int]) -> str | None:
    """Which of ``KINDS`` a box in an image of ``size`` (width, height) is; None: it is right."""
    width, height = size
    if not all(map(math.isfinite, box)):
        return "not finite"
    if box.x2 < box.x1 or box.y2 < box.y1:
        return "inverted"
    if box.x2 == box.x1 or box.y2 == box.y1:
        return "empty"
    if min(box.x1, box.y1) < -TOLERANCE or box.x2 > width + TOLERANCE or box.y2 > height + TOLERANCE:
        return "outside"
    return None


def repaired(box: Box, size: tuple[int, int]) -> Box | None:
    """Corners in order and inside the image; None where no area is left."""
    if not all(map(math.isfinite, box)):
        return None
    (x1, x2), (y1, y2) = sorted((box.x1, box.x2)), sorted((box.y1, box.y2))
    width, height = size
    clipped = Box(max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    return clipped if clipped.x2 > clipped.x1 and clipped.y2 > clipped.y1 else None


def treat(
    annotations: Iterable[Annotation], size_of: Callable[[Annotation], tuple[int, int]], choice: str = "skip"
) -> tuple[list[Annotation], WrongBoxes]:
    """The annotations whose boxes are right, and what was wrong with the others.

    Args:
        size_of: (width, height) of an annotation's image in pixels.
        choice: "skip" leaves wrong ones out; "repair" swaps and clips, and leaves out what has no area then; "error"
            raises at the first.

    Raises:
        UserError: no such choice, or a wrong box where ``choice`` is "error".
    """
    if choice not in CHOICES:
        raise UserError(f"wrong_boxes is {choice!r}; it must be one of {', '.join(CHOICES)}")
    kept: list[Annotation] = []
    found = WrongBoxes()
    for annotation in annotations:
        size = size_of(annotation)
        kind = kind_of(annotation.box, size)
        fixed = repaired(annotation.box, size) if kind is None or choice == "repair" else None
        if kind is None and fixed is None:
            kind = "outside"  # nothing is left of it but what the tolerance let through
        if kind is not None:
            found.counts[kind] += 1
            numbers = ", ".join(f"{value:g}" for value in annotation.box)
            example = f"{annotation.image.name} {annotation.sentence!r} [{numbers}] in {size[0]} x {size[1]}"
            if choice == "error":
                raise UserError(f"{annotation.image}: a box is {kind}: {example}")
            if len(found.examples) < _EXAMPLES:
                found.examples.append(example)
        if fixed is None:
            found.skipped += 1
        else:
            kept.append(annotation if fixed == annotation.box else replace(annotation, box=fixed))
    return kept, found
