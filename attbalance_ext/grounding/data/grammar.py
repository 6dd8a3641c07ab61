"""Choosing what to say about an object: the four flavours, named after the data sets whose language they imitate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .attributes import VALUES
from .expression import (
    DIRECTIONS,
    Beside,
    Between,
    Center,
    Clause,
    Compared,
    Corner,
    Description,
    Extreme,
    Nearest,
    Ordinal,
    SameAs,
    Side,
    Trait,
)
from .phrase import Style
from .scene import Scene

T = TypeVar("T")
Strategy = Callable[[np.random.Generator, Scene, int], Description | None]
"""Describes object ``target`` of a scene, or gives up (None). The result's referent is the target."""


@dataclass(frozen=True)
class Flavour:
    """A kind of referring expression: how often each strategy is tried (summing to 1), and how it is put into words."""

    strategies: tuple[tuple[float, Strategy], ...]
    style: Style

    def describe(self, rng: np.random.Generator, scene: Scene, target: int) -> Description | None:
        """One attempt at a description whose only referent is ``target``."""
        shares = np.cumsum([weight for weight, _ in self.strategies])
        _, strategy = self.strategies[int(np.searchsorted(shares, rng.random(), side="right"))]
        description = strategy(rng, scene, target)
        return description if description is not None and description.referent(scene) == target else None


def by_attributes(rng: np.random.Generator, scene: Scene, target: int) -> Description | None:
    """Attributes in random order, each kept if it excludes another object, until none is left; often one more.

    The incremental algorithm of Dale and Reiter (1995), with the redundancy people show.
    """
    return _distinguish(rng, scene, target, ())


def by_negation(rng: np.random.Generator, scene: Scene, target: int) -> Description | None:
    """Says what the target is not ("the circle that is not red"), and attributes as needed."""
    item = scene.objects[target]
    kind = ("colour", "colour", "texture", "shape")[int(rng.integers(4))]
    others = sorted({getattr(o, kind) for o in scene.objects} - {getattr(item, kind)})
    if not others:
        return None
    return _distinguish(rng, scene, target, (Trait(kind, _choose(rng, others), negated=True),))


def by_location(rng: np.random.Generator, scene: Scene, target: int) -> Description | None:
    """Some attributes, mostly too few, and a place that picks the target among those that share them."""
    traits = _some_traits(rng, scene, target)
    kind = _choose(rng, (Side, Side, Extreme, Corner, Corner, Center, Ordinal, Ordinal))
    return _first_fitting(scene, target, traits, _shuffled(rng, _PLACES[kind]))


def by_relation(rng: np.random.Generator, scene: Scene, target: int) -> Description | None:
    """Some attributes, mostly too few, and where the target lies from one or two other objects."""
    return _first_fitting(scene, target, _some_traits(rng, scene, target), _relations(rng, scene, target))


def by_likeness(rng: np.random.Generator, scene: Scene, target: int) -> Description | None:
    """Shares a colour or shape with another object: "the square with the same color as the star"."""
    item = scene.objects[target]
    kind = _choose(rng, ("colour", "shape"))
    alike = [i for i in _others(rng, scene, target) if getattr(scene.objects[i], kind) == getattr(item, kind)]
    for index in alike:
        anchor = _distinguish(rng, scene, index, (), without=kind)
        if anchor is not None:
            traits = tuple(t for t in _some_traits(rng, scene, target) if t.kind != kind)
            return Description(traits, SameAs(kind, anchor))
    return None


def by_size(rng: np.random.Generator, scene: Scene, target: int) -> Description | None:
    """Compares sizes: "the larger circle", "the smallest striped object"."""
    traits = tuple(t for t in _some_traits(rng, scene, target) if t.kind != "size")
    count = Description(traits).candidates(scene).bit_count()
    return Description(traits, Compared(scene.objects[target].size, of_two=count == 2))


FLAVOURS: dict[str, Flavour] = {
    "refcoco": Flavour(
        strategies=((0.85, by_location), (0.15, by_attributes)),
        style=Style(("the", "the", ""), ("the",), terse=False, synonym=0.3, after_noun=0.1, link=0.0),
    ),
    "refcoco+": Flavour(
        strategies=((0.5, by_attributes), (0.2, by_negation), (0.18, by_size), (0.12, by_likeness)),
        style=Style(("the", "", "the only"), ("the",), terse=False, synonym=0.4, after_noun=0.3, link=0.0),
    ),
    "refcocog": Flavour(
        strategies=((0.85, by_relation), (0.08, by_likeness), (0.07, by_attributes)),
        style=Style(("the", "a"), ("the",), terse=False, synonym=0.25, after_noun=0.25, link=0.5),
    ),
    "referit": Flavour(
        strategies=((0.6, by_location), (0.2, by_relation), (0.2, by_attributes)),
        style=Style(("",), ("", "the"), terse=True, synonym=0.65, after_noun=0.0, link=0.0),
    ),
}

_PLACES: dict[type[Clause], tuple[Clause, ...]] = {
    Side: tuple(Side(d) for d in DIRECTIONS),
    Extreme: tuple(Extreme(d) for d in DIRECTIONS),
    Corner: tuple(Corner(v, h) for v in ("top", "bottom") for h in ("left", "right")),
    Center: (Center(),),
    Ordinal: tuple(Ordinal(rank, d) for rank in (2, 3) for d in DIRECTIONS),
}


def _distinguish(
    rng: np.random.Generator, scene: Scene, target: int, given: tuple[Trait, ...], without: str | None = None
) -> Description | None:
    """Add attributes of ``target`` to ``given`` until no other object fits; None where all of them do not suffice."""
    item = scene.objects[target]
    kinds = [k for k in VALUES if k != without and all(t.kind != k for t in given)]
    traits, left = given, Description(given).candidates(scene)
    spare: list[Trait] = []
    for i in rng.permutation(len(kinds)):
        trait = Trait(kinds[int(i)], getattr(item, kinds[int(i)]))
        fewer = Description((*traits, trait)).candidates(scene)
        if fewer != left and left.bit_count() > 1:
            traits, left = (*traits, trait), fewer
        else:
            spare.append(trait)
    if left.bit_count() != 1:
        return None
    # People name the kind of thing even where it does not help.
    redundant = [t for t in spare if rng.random() < (0.7 if t.kind == "shape" else 0.12)]
    return Description((*traits, *redundant))


def _some_traits(rng: np.random.Generator, scene: Scene, target: int) -> tuple[Trait, ...]:
    """A few attributes of the target; nine times in ten few enough that another object has them all."""
    item = scene.objects[target]
    traits = [Trait(k, getattr(item, k)) for k in VALUES if rng.random() < (0.75 if k == "shape" else 0.3)]
    if rng.random() < 0.9:
        while traits and Description(tuple(traits)).candidates(scene).bit_count() < 2:
            traits.pop(int(rng.integers(len(traits))))
    return tuple(traits)


def _relations(rng: np.random.Generator, scene: Scene, target: int) -> Iterator[Clause]:
    """Relations of one kind to the other objects, in random order."""
    kind = _choose(rng, (Beside, Beside, Beside, Beside, Between, Between, Between, Nearest))
    far = rng.random() < 0.3
    known: list[Description] = []
    for index in _others(rng, scene, target):
        anchor = _distinguish(rng, scene, index, ())
        if anchor is None:
            continue
        if kind is Beside:
            yield from (Beside(direction, anchor) for direction in _shuffled(rng, DIRECTIONS))
        elif kind is Nearest:
            yield Nearest(anchor, far)
        else:
            yield from (Between(anchor, other) for other in known)
        known.append(anchor)


def _first_fitting(
    scene: Scene, target: int, traits: tuple[Trait, ...], clauses: Iterable[Clause]
) -> Description | None:
    """The traits with the first clause that makes them refer to ``target``."""
    descriptions = (Description(traits, clause) for clause in clauses)
    return next((d for d in descriptions if d.referent(scene) == target), None)


def _others(rng: np.random.Generator, scene: Scene, target: int) -> list[int]:
    """The other objects in random order."""
    return [i for i in _shuffled(rng, range(len(scene.objects))) if i != target]


def _shuffled(rng: np.random.Generator, values: Sequence[T]) -> list[T]:
    return [values[int(i)] for i in rng.permutation(len(values))]


def _choose(rng: np.random.Generator, values: Sequence[T]) -> T:
    return values[int(rng.integers(len(values)))]
