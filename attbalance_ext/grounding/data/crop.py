"""A crop of random size that keeps the ground truth.

The crop that published trainers use may cut the true box down to a sliver; the paper changes it (section 4, settings).
"""

from __future__ import annotations

import math
import random

from .annotations import Box

KEPT = 0.5
"""Least IoU of the kept part of the box with the box: the share of its area inside the crop."""
_TRIES = 20


def random_crop(size: tuple[int, int], box: Box, sides: tuple[float, float], generator: random.Random) -> Box:
    """A rectangle of whole pixels in an image of ``size`` (width, height) in which at least half of ``box`` lies.

    Its sides are drawn from ``sides``, (least, most) in pixels, and are no longer than the image's. Where no such
    rectangle is found in a few tries, it is the whole image.
    """
    width, height = size
    for _ in range(_TRIES):
        across, down = (
            min(max(1, round(generator.uniform(min(sides[0], limit), min(sides[1], limit)))), limit) for limit in size
        )
        left, top = generator.randint(0, width - across), generator.randint(0, height - down)
        crop = Box(float(left), float(top), float(left + across), float(top + down))
        if kept_share(box, crop) >= KEPT:
            return crop
    return Box(0.0, 0.0, float(width), float(height))


def kept_share(box: Box, crop: Box) -> float:
    """Area of the part of ``box`` inside ``crop`` / area of ``box``, which is the IoU of the two."""
    inside = intersection(box, crop)
    area = (box.x2 - box.x1) * (box.y2 - box.y1)
    kept = max(0.0, inside.x2 - inside.x1) * max(0.0, inside.y2 - inside.y1)
    return kept / area if math.isfinite(area) and area > 0 else 0.0


def intersection(box: Box, other: Box) -> Box:
    """The common part; inverted where there is none."""
    return Box(max(box.x1, other.x1), max(box.y1, other.y1), min(box.x2, other.x2), min(box.y2, other.y2))
