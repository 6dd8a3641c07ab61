"""What an object can be: shape, colour, size, texture; and which combinations training never shows."""

from __future__ import annotations

from itertools import product

SHAPES = ("circle", "square", "triangle", "diamond", "cross")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped")

VALUES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "size": SIZES,
    "texture": TEXTURES,
}
"""The values of each attribute. Labels in ``Objects`` are positions in these tuples."""

Combination = tuple[str, str, str, str]
"""(shape, colour, size, texture)"""


def is_held_out(combination: Combination) -> bool:
    """True for the 18 of 120 combinations that no object of train, val and test has.

    The rule takes at most one combination from each (shape, colour) pair, so every pair of attribute values
    is still seen in training: what is new in the split ``test_novel`` is only how they come together.
    """
    shape, colour, size, texture = (VALUES[kind].index(value) for kind, value in zip(VALUES, combination, strict=True))
    return (shape + colour + 2 * size + 3 * texture) % 7 == 0


EVERY: tuple[Combination, ...] = tuple(product(SHAPES, COLOURS, SIZES, TEXTURES))
SEEN = tuple(combination for combination in EVERY if not is_held_out(combination))
HELD_OUT = tuple(combination for combination in EVERY if is_held_out(combination))
