"""A second opinion on what the sentences mean."""

from __future__ import annotations

import math
import re
from typing import ClassVar

import pytest
from helpers_data import NAMES, examples

from attbalance_ext.grounding.data.names import BuiltinName
from attbalance_ext.grounding.data.scene import Scene


class Reader:
    """Reads attributes, negations, sides, corners and relations to one object. None for other sentences."""

    WORDS: ClassVar = {
        "circle": "circle disc ball", "square": "square box block", "triangle": "triangle wedge pyramid",
        "diamond": "diamond rhombus lozenge", "cross": "cross plus", "red": "red crimson scarlet",
        "orange": "orange tangerine amber", "yellow": "yellow golden lemon", "green": "green emerald lime",
        "blue": "blue azure cobalt", "purple": "purple violet lilac", "small": "small little tiny",
        "large": "large big huge", "plain": "plain solid unstriped", "striped": "striped stripy banded",
    }  # fmt: skip
    VALUE: ClassVar = {word: value for value, words in WORDS.items() for word in words.split()}
    EMPTY: ClassVar = {"the", "a", "an", "only", "object", "shape", "thing", "one", "sign", "that", "which", "is"}
    OTHERS = re.compile(
        "between|same|second|third|middle|center|farthest|very|two|"
        r"\b(?:larg|bigg|small|littl|tini)(?:er|est)\b"
    )
    RELATION = re.compile(
        r"^(.+?) (?:that is |which is )?((?:to the )?left of|(?:to the )?right of|on the left side of|"
        r"on the right side of|above|over|below|under|beneath|higher up than|(?:closest|nearest) to) (.+)$"
    )
    PLACE = re.compile(
        r"\b(?:in the |on the |at the )?"
        r"(?:(?:top|upper|bottom|lower|topmost|uppermost|highest|lowest|bottommost|lowermost)(?: left| right)?"
        r"|(?:far )?(?:left|right)|leftmost|rightmost)(?: corner| side)?\b"
    )

    def __init__(self, scene: Scene) -> None:
        self.objects = scene.objects

    def read(self, sentence: str) -> list[int] | None:
        if self.OTHERS.search(sentence):
            return None
        relation = self.RELATION.match(sentence)
        if relation:
            return self.relation(*relation.groups())
        place = self.PLACE.search(sentence)
        if place:
            fitting = self.fitting(sentence[: place.start()] + " " + sentence[place.end() :])
            return fitting and [max(fitting, key=lambda i: self.towards(i, place.group(0)))]
        return self.fitting(sentence)

    def relation(self, what: str, how: str, other: str) -> list[int] | None:
        fitting, anchors = self.fitting(what), self.fitting(other)
        if fitting is None or anchors is None:
            return None
        assert len(anchors) == 1
        (x, y), fitting = self.objects[anchors[0]].center, [i for i in fitting if i != anchors[0]]
        if "est to" in how:
            return [min(fitting, key=lambda i: math.dist(self.objects[i].center, (x, y)))]
        sign_x, sign_y = -("left" in how) + ("right" in how), -(how in ("above", "over", "higher up than"))
        if not sign_x and not sign_y:
            sign_y = 1
        centers = {i: self.objects[i].center for i in fitting}
        return [i for i, c in centers.items() if (c[0] - x) * sign_x + (c[1] - y) * sign_y > 0.02]

    def towards(self, index: int, place: str) -> float:
        x, y = self.objects[index].center
        across = -x if "left" in place else x if "right" in place else 0
        up = re.search("top|upper|high", place)
        return across + (-y if up else y if re.search("bottom|low", place) else 0)

    def fitting(self, phrase: str) -> list[int] | None:
        phrase = phrase.replace("isn't", "is not")
        phrase = re.sub(r"(?:without|with no) stripes", "plain", re.sub(r"(?:with|having) stripes", "striped", phrase))
        wanted: list[str] = []
        unwanted: list[str] = []
        denied = False
        for word in phrase.split():
            if word == "not":
                denied = True
            elif word in self.VALUE:
                (unwanted if denied else wanted).append(self.VALUE[word])
            elif word not in self.EMPTY:
                return None
        return [
            i
            for i, item in enumerate(self.objects)
            if set(wanted) <= set(item.combination) and not set(unwanted) & set(item.combination)
        ]


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_a_reader_who_knows_only_english_finds_the_target(name: BuiltinName) -> None:
    """An interpreter that shares no code with the grammar reads the text and the labels."""
    read = 0
    for scene, reference in examples(name, "val", 60):
        found = Reader(scene).read(reference.sentence)
        if found is not None:
            read += 1
            assert found == [reference.target], reference
    assert read > 60
