"""Drawing a scene: Pillow draws masks at several times the resolution, integers do the rest.

All arithmetic on pixels is integer, so a scene gives the same bytes wherever Pillow draws the same polygons.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from .scene import CANVAS, Backdrop, Scene, SceneObject

_NOISE = 12
"""Largest change of a pixel's channel by noise, of 255."""


def render(scene: Scene, size: int) -> np.ndarray:
    """Draw ``scene`` as a (size, size, 3) uint8 image; ``size`` divides ``CANVAS``."""
    image = _draw_backdrop(scene.backdrop, size)
    for item in scene.objects:
        (left, top), shape, stripes = coverage(item, size)
        height, width = shape.shape
        window = image[top : top + height, left : left + width]
        paint, stripe_paint = np.array(item.paint), np.array(item.stripe_paint)
        ground = (255 - shape)[..., None] * window
        window[:] = (ground + (shape - stripes)[..., None] * paint + stripes[..., None] * stripe_paint) // 255
    noise = np.random.default_rng([scene.backdrop.noise_seed, size]).integers(
        -_NOISE, _NOISE + 1, (size, size, 3), dtype=np.int16
    )
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def coverage(item: SceneObject, size: int) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """How much of each pixel the object and its stripes cover, 0 to 255.

    Returns the (left, top) pixel of the window around the object and two (h, w) int32 arrays.
    """
    unit = CANVAS // size
    x1, y1, x2, y2 = item.box
    left, top, right, bottom = x1 // unit, y1 // unit, -(-x2 // unit), -(-y2 // unit)
    origin_x, origin_y = left * unit, top * unit
    extent = ((right - left) * unit, (bottom - top) * unit)
    shape = Image.new("L", extent)
    ImageDraw.Draw(shape).polygon([(x - origin_x, y - origin_y) for x, y in item.outline], fill=255)
    if item.texture == "striped":
        center = ((x1 + x2) / 2 - origin_x, (y1 + y2) / 2 - origin_y)
        stripes = ImageChops.multiply(shape, _draw_stripes(extent, center, item.stripe_angle, item.stripe_width))
    else:
        stripes = Image.new("L", extent)
    return (left, top), _reduce(shape, unit), _reduce(stripes, unit)


def _reduce(mask: Image.Image, unit: int) -> np.ndarray:
    """Means of ``unit`` x ``unit`` blocks."""
    return np.asarray(mask.reduce(unit), dtype=np.int32)


def _draw_stripes(extent: tuple[int, int], center: tuple[float, float], angle: int, width: int) -> Image.Image:
    """Parallel bands, ``width`` units thick and ``width`` units apart, one of them through the centre."""
    mask = Image.new("L", extent)
    draw = ImageDraw.Draw(mask)
    along = (math.cos(math.radians(angle)), math.sin(math.radians(angle)))
    across = (-along[1], along[0])
    reach = max(extent)
    for band in range(-(reach // (2 * width)) - 1, reach // (2 * width) + 2):
        corners = [
            (
                round(center[0] + sign * reach * along[0] + (2 * band + side) * width * across[0]),
                round(center[1] + sign * reach * along[1] + (2 * band + side) * width * across[1]),
            )
            for sign, side in ((-1, -0.5), (1, -0.5), (1, 0.5), (-1, 0.5))
        ]
        draw.polygon(corners, fill=255)
    return mask


def _draw_backdrop(backdrop: Backdrop, size: int) -> np.ndarray:
    """The (size, size, 3) int32 surface with its lines, half a pixel to a pixel wide."""
    surface = Image.fromarray(backdrop.grid).resize((2 * size, 2 * size), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(surface)
    scale = 2 * size / CANVAS
    for start, end, colour in backdrop.lines:
        points = [(round(x * scale), round(y * scale)) for x, y in (start, end)]
        draw.line(points, fill=colour, width=max(1, size // 64))
    return np.asarray(surface.reduce(2), dtype=np.int32)
