"""Every word and phrase a sentence is made of. In each tuple the first entry is the usual way to say it.

``{n}`` stands for a noun with its modifiers, ``{a}`` and ``{b}`` for descriptions of other objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from string import Formatter

Phrases = dict[str, tuple[str, ...]]

NOUNS: Phrases = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "wedge", "pyramid"),
    "diamond": ("diamond", "rhombus", "lozenge"),
    "cross": ("cross", "plus", "plus sign"),
}
ANY_NOUN = ("object", "shape", "thing", "one")
ADJECTIVES: Phrases = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange", "tangerine", "amber"),
    "yellow": ("yellow", "golden", "lemon"),
    "green": ("green", "emerald", "lime"),
    "blue": ("blue", "azure", "cobalt"),
    "purple": ("purple", "violet", "lilac"),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "plain": ("plain", "solid", "unstriped"),
    "striped": ("striped", "stripy", "banded"),
}
AFTER_NOUN: Phrases = {
    "striped": ("with stripes", "having stripes"),
    "plain": ("without stripes", "with no stripes"),
}
"""Ways to say a texture after the noun besides ``LINKS``."""
LINKS = ("that is", "which is")
NEGATIONS = ("that is not", "which is not", "that isn't")
DETERMINERS = ("the", "a", "an", "the only")

SIDE: Phrases = {
    "left": ("left {n}", "{n} on the left", "{n} on the left side"),
    "right": ("right {n}", "{n} on the right", "{n} on the right side"),
    "top": ("top {n}", "{n} at the top", "upper {n}"),
    "bottom": ("bottom {n}", "{n} at the bottom", "lower {n}"),
}
EXTREME: Phrases = {
    "left": ("leftmost {n}", "far left {n}", "{n} farthest to the left"),
    "right": ("rightmost {n}", "far right {n}", "{n} farthest to the right"),
    "top": ("topmost {n}", "highest {n}", "uppermost {n}"),
    "bottom": ("lowest {n}", "bottommost {n}", "lowermost {n}"),
}
CORNER: Phrases = {
    f"{vertical} {horizontal}": (
        f"{vertical} {horizontal} {{n}}",
        f"{{n}} in the {vertical} {horizontal} corner",
        f"{{n}} in the {vertical} {horizontal}",
        f"{other} {horizontal} {{n}}",
    )
    for vertical, other in (("top", "upper"), ("bottom", "lower"))
    for horizontal in ("left", "right")
}
CENTER = ("{n} in the middle", "middle {n}", "{n} in the center", "center {n}")
RANKS = {2: "second", 3: "third"}
ORDINAL: Phrases = {
    f"{rank} {direction}": (f"{rank} {{n}} from the {direction}", f"{{n}} {rank} from the {direction}")
    for rank in RANKS.values()
    for direction in ("left", "right", "top", "bottom")
}

TERSE_SIDE: Phrases = {
    "left": ("{n} left", "left {n}", "{n} left side"),
    "right": ("{n} right", "right {n}", "{n} right side"),
    "top": ("{n} top", "top {n}", "upper {n}"),
    "bottom": ("{n} bottom", "bottom {n}", "lower {n}"),
}
TERSE_EXTREME: Phrases = {
    "left": ("leftmost {n}", "{n} far left", "far left {n}"),
    "right": ("rightmost {n}", "{n} far right", "far right {n}"),
    "top": ("highest {n}", "{n} very top", "topmost {n}"),
    "bottom": ("lowest {n}", "{n} very bottom", "bottommost {n}"),
}
TERSE_CORNER: Phrases = {
    f"{vertical} {horizontal}": (
        f"{{n}} {vertical} {horizontal}",
        f"{{n}} {other} {horizontal}",
        f"{vertical} {horizontal} {{n}}",
        f"{other} {horizontal} {{n}}",
    )
    for vertical, other in (("top", "upper"), ("bottom", "lower"))
    for horizontal in ("left", "right")
}
TERSE_CENTER = ("{n} middle", "middle {n}", "{n} center", "center {n}")
TERSE_ORDINAL: Phrases = {
    f"{rank} {direction}": (f"{rank} {{n}} from {direction}", f"{{n}} {rank} from {direction}")
    for rank in RANKS.values()
    for direction in ("left", "right", "top", "bottom")
}

BESIDE: Phrases = {
    "left": ("{n} to the left of {a}", "{n} left of {a}", "{n} on the left side of {a}"),
    "right": ("{n} to the right of {a}", "{n} right of {a}", "{n} on the right side of {a}"),
    "top": ("{n} above {a}", "{n} over {a}", "{n} higher up than {a}"),
    "bottom": ("{n} below {a}", "{n} under {a}", "{n} beneath {a}"),
}
NEAREST = ("{n} closest to {a}", "{n} nearest to {a}")
FARTHEST = ("{n} farthest from {a}", "{n} farthest away from {a}")
BETWEEN = ("{n} between {a} and {b}", "{n} in between {a} and {b}")
SAME_AS: Phrases = {
    "colour": ("{n} with the same color as {a}", "{n} of the same color as {a}"),
    "shape": ("{n} with the same shape as {a}", "{n} of the same shape as {a}"),
}
LARGER: Phrases = {
    "large": ("larger {n}", "bigger {n}", "larger {n} of the two"),
    "small": ("smaller {n}", "littler {n}", "smaller {n} of the two"),
}
LARGEST: Phrases = {
    "large": ("largest {n}", "biggest {n}"),
    "small": ("smallest {n}", "tiniest {n}"),
}


def words() -> list[str]:
    """All words of the language, sorted."""
    found: set[str] = set()
    for name, value in globals().items():
        if name.isupper():
            for phrase in _phrases(value):
                literal = " ".join(text for text, *_ in Formatter().parse(phrase))
                found.update(literal.split())
    return sorted(found)


def _phrases(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for phrases in value.values():
            yield from _phrases(phrases)
    elif isinstance(value, tuple):
        for phrases in value:
            yield from _phrases(phrases)
