"""What a sentence means: descriptions, and which object of a scene they single out.

A description is a conjunction of traits (values of attributes) and at most one clause (a place, a relation to another
object, a comparison). Sets of objects are bit masks. A clause answers with two sets, those that *surely* fit and
those that *possibly* do: "left of" is sure for an object well to the left, impossible for one on the right and
open in between. A description refers only where nothing is open, so no sentence depends on where a person
would draw such a line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

from .scene import Scene, SceneObject


class Denotation(NamedTuple):
    """Bit masks over the objects of a scene; ``sure`` is a subset of ``possible``."""

    sure: int
    possible: int


@dataclass(frozen=True)
class Trait:
    """An attribute has a value, or (negated) has another one."""

    kind: str
    value: str
    negated: bool = False

    def mask(self, scene: Scene) -> int:
        """The objects of the scene that have it."""
        having = scene.having.get((self.kind, self.value), 0)
        return scene.everything & ~having if self.negated else having


@dataclass(frozen=True)
class Description:
    """Traits, all of which must fit, and at most one clause that picks among the objects that fit them."""

    traits: tuple[Trait, ...] = ()
    clause: Clause | None = None

    def candidates(self, scene: Scene) -> int:
        """The objects that have the traits, the clause left out."""
        mask = scene.everything
        for trait in self.traits:
            mask &= trait.mask(scene)
        return mask

    def denotation(self, scene: Scene) -> Denotation:
        candidates = self.candidates(scene)
        if self.clause is None:
            return Denotation(candidates, candidates)
        return self.clause.pick(scene, candidates)

    def referent(self, scene: Scene) -> int | None:
        """The index of the only object described; None where there is none, several, or a doubt."""
        sure, possible = self.denotation(scene)
        return sure.bit_length() - 1 if sure == possible and sure.bit_count() == 1 else None

    def trait(self, kind: str) -> Trait | None:
        """The trait of one kind, if the description has it."""
        return next((trait for trait in self.traits if trait.kind == kind), None)


GROUPS = ("location", "relation", "comparison", "likeness")


class Clause:
    """Picks among candidates. ``group`` is one of ``GROUPS``."""

    group: ClassVar[str]

    def pick(self, scene: Scene, candidates: int) -> Denotation:
        raise NotImplementedError


_AXIS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "top": (0.0, -1.0), "bottom": (0.0, 1.0)}
"""Unit vectors towards each side, y downwards."""
DIRECTIONS = tuple(_AXIS)


@dataclass(frozen=True)
class Extreme(Clause):
    """The candidate farthest towards one side ("leftmost"), clear of the next by 0.07 of the image."""

    group = "location"
    direction: str

    def pick(self, scene: Scene, candidates: int) -> Denotation:
        return _farthest_along(scene, candidates, _AXIS[self.direction], margin=0.07)


@dataclass(frozen=True)
class Side(Clause):
    """ "On the left": the farthest candidate on that side, which must also lie in that half of the image.

    True both for who reads "leftmost of them" and for who reads "the one in the left half".
    """

    group = "location"
    direction: str

    def pick(self, scene: Scene, candidates: int) -> Denotation:
        axis = _AXIS[self.direction]
        found = _farthest_along(scene, candidates, axis, margin=0.12)
        half = sum(1 << i for i in _members(candidates) if _along(scene.objects[i], axis) > 0)
        return found if found.sure & half else Denotation(0, candidates)


@dataclass(frozen=True)
class Corner(Clause):
    """ "Upper left": the candidate farthest towards the corner, inside that quarter of the image."""

    group = "location"
    vertical: str
    horizontal: str

    def pick(self, scene: Scene, candidates: int) -> Denotation:
        vertical, horizontal = _AXIS[self.vertical], _AXIS[self.horizontal]
        found = _farthest_along(scene, candidates, (horizontal[0], vertical[1]), margin=0.15)
        for index in _members(found.sure):
            item = scene.objects[index]
            if min(_along(item, vertical), _along(item, horizontal)) < 0.05:
                return Denotation(0, candidates)
        return found


@dataclass(frozen=True)
class Center(Clause):
    """ "In the middle": within 0.16 of the image's centre, and every other candidate 0.14 farther away."""

    group = "location"

    def pick(self, scene: Scene, candidates: int) -> Denotation:
        found = _least(candidates, [math.dist(o.center, (0.5, 0.5)) for o in scene.objects], margin=0.14)
        for index in _members(found.sure):
            if math.dist(scene.objects[index].center, (0.5, 0.5)) > 0.16:
                return Denotation(0, candidates)
        return found


@dataclass(frozen=True)
class Ordinal(Clause):
    """ "Second from the left": the candidate of that rank, at least 0.06 from its neighbours in the order."""

    group = "location"
    rank: int
    direction: str

    def pick(self, scene: Scene, candidates: int) -> Denotation:
        axis = _AXIS[self.direction]
        ordered = sorted((-_along(scene.objects[i], axis), i) for i in _members(candidates))
        if len(ordered) <= self.rank:
            return Denotation(0, candidates)
        places = [place for place, _ in ordered[: self.rank + 1]]
        if min(after - before for before, after in pairwise(places)) < 0.06:
            return Denotation(0, candidates)
        chosen = 1 << ordered[self.rank - 1][1]
        return Denotation(chosen, chosen)


@dataclass(frozen=True)
class Beside(Clause):
    """ "To the left of the red square": sure if 0.1 of the image or more that way and not farther off sideways,
    impossible if less than 0.02 that way.
    """

    group = "relation"
    direction: str
    anchor: Description

    def pick(self, scene: Scene, candidates: int) -> Denotation:
        anchor = self.anchor.referent(scene)
        if anchor is None:
            return Denotation(0, candidates)
        x, y = scene.objects[anchor].center
        axis = _AXIS[self.direction]
        sure = possible = 0
        for index in _members(candidates & ~(1 << anchor)):
            dx, dy = scene.objects[index].center[0] - x, scene.objects[index].center[1] - y
            ahead = dx * axis[0] + dy * axis[1]
            aside = abs(dx * axis[1]) + abs(dy * axis[0])
            if ahead >= 0.02:
                possible |= 1 << index
                if ahead >= 0.1 and aside <= ahead:
                    sure |= 1 << index
        return Denotation(sure, possible)


@dataclass(frozen=True)
class Nearest(Clause):
    """ "Closest to the red square" (or "farthest from" it), clear of the next candidate by 0.08 of the image."""

    group = "relation"
    anchor: Description
    far: bool = False

    def pick(self, scene: Scene, candidates: int) -> Denotation:
        anchor = self.anchor.referent(scene)
        if anchor is None:
            return Denotation(0, candidates)
        sign = -1 if self.far else 1
        distances = [sign * math.dist(o.center, scene.objects[anchor].center) for o in scene.objects]
        return _least(candidates & ~(1 << anchor), distances, margin=0.08)


@dataclass(frozen=True)
class Between(Clause):
    """ "Between A and B": sure near the inner part of the line from A to B, impossible outside a wide band of it."""

    group = "relation"
    first: Description
    second: Description

    def pick(self, scene: Scene, candidates: int) -> Denotation:
        first, second = self.first.referent(scene), self.second.referent(scene)
        if first is None or second is None or first == second:
            return Denotation(0, candidates)
        (x1, y1), (x2, y2) = scene.objects[first].center, scene.objects[second].center
        length = math.dist((x1, y1), (x2, y2))
        sure = possible = 0
        for index in _members(candidates & ~(1 << first | 1 << second)):
            x, y = scene.objects[index].center
            along = ((x - x1) * (x2 - x1) + (y - y1) * (y2 - y1)) / length**2
            aside = abs((x - x1) * (y2 - y1) - (y - y1) * (x2 - x1)) / length
            if 0.05 < along < 0.95 and aside < 0.25:
                possible |= 1 << index
                if 0.25 <= along <= 0.75 and aside <= 0.12:
                    sure |= 1 << index
        return Denotation(sure, possible)


@dataclass(frozen=True)
class SameAs(Clause):
    """ "With the same colour as the star": any candidate but the star itself."""

    group = "likeness"
    kind: str
    anchor: Description

    def pick(self, scene: Scene, candidates: int) -> Denotation:
        anchor = self.anchor.referent(scene)
        if anchor is None:
            return Denotation(0, candidates)
        value = getattr(scene.objects[anchor], self.kind)
        alike = sum(
            1 << i for i in _members(candidates & ~(1 << anchor)) if getattr(scene.objects[i], self.kind) == value
        )
        return Denotation(alike, alike)


@dataclass(frozen=True)
class Compared(Clause):
    """ "The larger of the two", "the largest": the only candidate of that size class.

    The radii of the two classes differ by 1.4 or more, and inside a class by 1.22 at most: being the largest is
    only said where it shows. ``of_two`` asks for exactly two candidates ("larger"), otherwise three or more.
    """

    group = "comparison"
    size: str
    of_two: bool

    def pick(self, scene: Scene, candidates: int) -> Denotation:
        if (candidates.bit_count() == 2) != self.of_two or candidates.bit_count() < 2:
            return Denotation(0, candidates)
        fits = sum(1 << i for i in _members(candidates) if scene.objects[i].size == self.size)
        return Denotation(fits, fits)


def _members(mask: int) -> list[int]:
    return [i for i in range(mask.bit_length()) if mask >> i & 1]


def _along(item: SceneObject, axis: tuple[float, float]) -> float:
    """How far the centre lies from the image's centre along ``axis``."""
    return (item.center[0] - 0.5) * axis[0] + (item.center[1] - 0.5) * axis[1]


def _farthest_along(scene: Scene, candidates: int, axis: tuple[float, float], margin: float) -> Denotation:
    return _least(candidates, [-_along(item, axis) for item in scene.objects], margin)


def _least(candidates: int, values: list[float], margin: float) -> Denotation:
    """The candidate with the least value, in doubt where another is within ``margin`` of it."""
    if not candidates:
        return Denotation(0, 0)
    least = min(values[i] for i in _members(candidates))
    close = sum(1 << i for i in _members(candidates) if values[i] < least + margin)
    return Denotation(close if close.bit_count() == 1 else 0, close)
