"""What a mirror does to a sentence: left and right change places."""

from __future__ import annotations

import re

_MIRRORED = {"left": "right", "right": "left", "lft": "rt", "rt": "lft"}
_SIDE = re.compile(
    r"\b(top|bottom|upper|lower|front|back|far|mid)?(?:(left|right)(most|hand|side|wards?|y)?|(lft|rt))\b",
    re.IGNORECASE,
)


def mirror(sentence: str) -> str:
    """Swap left and right, as words: "Leftmost" becomes "Rightmost", "bright" and "leftover" stay.

    Words joined to others by a hyphen or an apostrophe count ("left-hand", "right's"), so do leftmost, lefthand,
    leftside, leftward and lefty, topleft and its like, and the abbreviations lft and rt of RefCOCO.
    """
    return _SIDE.sub(_swap, sentence)


def _swap(found: re.Match[str]) -> str:
    before, word, after, short = found.groups(default="")
    side = word or short
    other = _MIRRORED[side.lower()]
    if side.isupper():
        other = other.upper()
    elif side[0].isupper():
        other = other.capitalize()
    return before + other + after
