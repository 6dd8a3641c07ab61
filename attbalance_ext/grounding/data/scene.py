"""Scenes: which objects there are, what they look like and where they lie. Drawing them is ``render.py``."""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .attributes import HELD_OUT, SEEN, SIZES, TEXTURES, VALUES, Combination, is_held_out

CANVAS = 512
"""Side of the square canvas in units. Geometry is whole units, so every image size shows the same scene."""

Point = tuple[int, int]
Colour = tuple[int, int, int]

_RADIUS = {"small": (40, 46), "large": (66, 80)}
"""Nominal radius in units, from a uniform distribution. The gap keeps "small" and "large" apart by eye."""
_MARGIN = 6
"""Least distance in units between two boxes, and between a box and the border."""
_HUE = {"red": 0.0, "orange": 0.078, "yellow": 0.155, "green": 0.345, "blue": 0.605, "purple": 0.79}


@dataclass(frozen=True)
class SceneObject:
    """One object: attributes, outline and paint. ``box`` is (x1, y1, x2, y2) in units, the end excluded."""

    shape: str
    colour: str
    size: str
    texture: str
    outline: tuple[Point, ...]
    paint: Colour
    stripe_paint: Colour
    stripe_angle: int
    stripe_width: int

    @property
    def combination(self) -> Combination:
        return self.shape, self.colour, self.size, self.texture

    @cached_property
    def box(self) -> tuple[int, int, int, int]:
        xs, ys = zip(*self.outline, strict=True)
        return min(xs), min(ys), max(xs) + 1, max(ys) + 1

    @cached_property
    def center(self) -> tuple[float, float]:
        """Centre of the box as fractions of the image's width and height."""
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / (2 * CANVAS), (y1 + y2) / (2 * CANVAS)


@dataclass(frozen=True)
class Backdrop:
    """What lies behind the objects: a coarse grid of colours to be interpolated, and thin lines."""

    grid: np.ndarray  # (G, G, 3) uint8
    lines: tuple[tuple[Point, Point, Colour], ...]
    noise_seed: int


@dataclass(frozen=True)
class Scene:
    objects: tuple[SceneObject, ...]
    backdrop: Backdrop

    @cached_property
    def everything(self) -> int:
        """Bit mask of all objects."""
        return (1 << len(self.objects)) - 1

    @cached_property
    def having(self) -> dict[tuple[str, str], int]:
        """(attribute, value) -> bit mask of the objects with it."""
        masks: dict[tuple[str, str], int] = {}
        for index, item in enumerate(self.objects):
            for pair in zip(VALUES, item.combination, strict=True):
                masks[pair] = masks.get(pair, 0) | 1 << index
        return masks


@dataclass(frozen=True)
class SceneRules:
    """How many objects, how big (a factor on the radius), and how often one repeats another but for one attribute."""

    count: tuple[int, int]
    scale: float
    near_copy: float


STANDARD = SceneRules(count=(3, 6), scale=1.0, near_copy=0.0)
HARD = SceneRules(count=(6, 9), scale=0.85, near_copy=0.75)


def sample_scene(rng: np.random.Generator, rules: SceneRules, novel: bool = False) -> Scene:
    """Draw a scene. With ``novel`` at least one object has a held-out combination, otherwise none has."""
    while True:
        combinations = _sample_combinations(rng, rules, novel)
        outlines = _place(rng, [_sample_outline(rng, c, rules.scale) for c in combinations])
        if outlines is not None:
            objects = tuple(_paint(rng, c, outline) for c, outline in zip(combinations, outlines, strict=True))
            return Scene(objects, _sample_backdrop(rng))


def _sample_combinations(rng: np.random.Generator, rules: SceneRules, novel: bool) -> list[Combination]:
    """Attributes of all objects, from two or three colours and one to three shapes, so that distractors arise."""
    count = int(rng.integers(rules.count[0], rules.count[1] + 1))
    chosen: list[Combination] = []
    shapes = _subset(rng, VALUES["shape"], int(rng.integers(1, 4)))
    colours = _subset(rng, VALUES["colour"], int(rng.integers(2, 4)))
    if novel:
        first = HELD_OUT[int(rng.integers(len(HELD_OUT)))]
        chosen.append(first)
        shapes = _including(shapes, first[0])
        colours = _including(colours, first[1])
    palette = {"shape": shapes, "colour": colours, "size": SIZES, "texture": TEXTURES}
    allowed = [c for c in SEEN if c[0] in shapes and c[1] in colours]
    while len(chosen) < count:
        if chosen and rng.random() < rules.near_copy:
            candidate = _near_copy(rng, chosen[int(rng.integers(len(chosen)))], palette)
            if is_held_out(candidate):
                continue
        else:
            candidate = allowed[int(rng.integers(len(allowed)))]
        chosen.append(candidate)
    return chosen


def _subset(rng: np.random.Generator, values: tuple[str, ...], count: int) -> tuple[str, ...]:
    order = rng.permutation(len(values))[:count]
    return tuple(values[int(i)] for i in order)


def _including(values: tuple[str, ...], value: str) -> tuple[str, ...]:
    return values if value in values else (value, *values[1:])


def _near_copy(rng: np.random.Generator, original: Combination, palette: dict[str, tuple[str, ...]]) -> Combination:
    """The same combination with one attribute changed inside the scene's palette."""
    changed = list(original)
    kinds = [i for i, values in enumerate(palette.values()) if len(values) > 1]
    kind = kinds[int(rng.integers(len(kinds)))]
    others = [v for v in tuple(palette.values())[kind] if v != original[kind]]
    changed[kind] = others[int(rng.integers(len(others)))]
    return changed[0], changed[1], changed[2], changed[3]


def _sample_outline(rng: np.random.Generator, combination: Combination, scale: float) -> list[Point]:
    """The outline around (0, 0), turned by up to ten degrees."""
    low, high = _RADIUS[combination[2]]
    radius = scale * (low + (high - low) * rng.random())
    turn = math.radians(20 * rng.random() - 10)
    cos, sin = math.cos(turn), math.sin(turn)
    return [
        (round(radius * (x * cos - y * sin)), round(radius * (x * sin + y * cos))) for x, y in _UNIT[combination[0]]
    ]


def _place(rng: np.random.Generator, outlines: list[list[Point]]) -> list[tuple[Point, ...]] | None:
    """Move outlines to random places where no two boxes touch; None where that takes too long. Big ones go first."""
    extents = [
        (min(x for x, _ in o), min(y for _, y in o), max(x for x, _ in o), max(y for _, y in o)) for o in outlines
    ]
    taken: list[tuple[int, int, int, int]] = []
    placed: list[tuple[Point, ...]] = [()] * len(outlines)
    for index in sorted(range(len(outlines)), key=lambda i: extents[i][0] - extents[i][2]):
        left, top, right, bottom = extents[index]
        for _ in range(60):
            x = int(rng.integers(_MARGIN - left, CANVAS - _MARGIN - right))
            y = int(rng.integers(_MARGIN - top, CANVAS - _MARGIN - bottom))
            box = (x + left, y + top, x + right + 1, y + bottom + 1)
            if not any(_touch(box, other) for other in taken):
                taken.append(box)
                placed[index] = tuple((x + dx, y + dy) for dx, dy in outlines[index])
                break
        else:
            return None
    return placed


def _touch(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] + _MARGIN and b[0] < a[2] + _MARGIN and a[1] < b[3] + _MARGIN and b[1] < a[3] + _MARGIN


def _paint(rng: np.random.Generator, combination: Combination, outline: tuple[Point, ...]) -> SceneObject:
    shape, colour, size, texture = combination
    hue = (_HUE[colour] + 0.02 * (rng.random() - 0.5)) % 1.0
    paint = _rgb(hue, 0.78 + 0.22 * rng.random(), 0.82 + 0.18 * rng.random())
    stripe_paint = _rgb(hue, 0.15, 1.0) if rng.random() < 0.5 else _rgb(hue, 0.6, 0.22)
    return SceneObject(
        shape=shape,
        colour=colour,
        size=size,
        texture=texture,
        outline=outline,
        paint=paint,
        stripe_paint=stripe_paint,
        stripe_angle=int(rng.integers(0, 4)) * 45,
        stripe_width=int(rng.integers(15, 20)),
    )


def _sample_backdrop(rng: np.random.Generator) -> Backdrop:
    """A greyish, slowly varying surface with two to six thin, pale or dark lines across it."""
    side = int(rng.integers(3, 8))
    grey = rng.integers(70, 175, (side, side, 1))
    grid = (grey + rng.integers(-18, 19, (side, side, 3))).astype(np.uint8)
    lines = []
    for _ in range(int(rng.integers(2, 7))):
        x1, y1, x2, y2 = (int(v) for v in rng.integers(0, CANVAS, 4))
        grey_level = int(rng.integers(40, 216))
        red, green, blue = (grey_level + int(v) for v in rng.integers(-25, 26, 3))
        lines.append(((x1, y1), (x2, y2), (red, green, blue)))
    return Backdrop(grid, tuple(lines), int(rng.integers(2**31)))


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _regular(corners: int, radius: float, first: float) -> tuple[tuple[float, float], ...]:
    angles = [math.radians(first + 360 * i / corners) for i in range(corners)]
    return tuple((radius * math.cos(a), radius * math.sin(a)) for a in angles)


_ARM = 0.36
_UNIT = {
    "circle": _regular(48, 1.0, 0.0),
    "square": _regular(4, 1.25, 45.0),
    "triangle": _regular(3, 1.25, -90.0),
    "diamond": ((0.0, -1.25), (0.78, 0.0), (0.0, 1.25), (-0.78, 0.0)),
    "cross": (
        (-_ARM, -1.1), (_ARM, -1.1), (_ARM, -_ARM), (1.1, -_ARM), (1.1, _ARM), (_ARM, _ARM),
        (_ARM, 1.1), (-_ARM, 1.1), (-_ARM, _ARM), (-1.1, _ARM), (-1.1, -_ARM), (-_ARM, -_ARM),
    ),
}  # fmt: skip
"""Outlines of radius one, y downwards."""
