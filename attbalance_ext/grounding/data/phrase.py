"""Putting a description into words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import lexicon
from .expression import (
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


@dataclass(frozen=True)
class Style:
    """How a flavour talks. The last four are probabilities."""

    determiners: tuple[str, ...]
    """Before a description without clause, or with one; ``""`` for none."""
    anchor_determiners: tuple[str, ...]
    """Before the object that a relation refers to."""
    terse: bool
    """Places without prepositions, adjectives in any order."""
    synonym: float
    """A rarer word instead of the usual one."""
    after_noun: float
    """One attribute after the noun: "the circle with stripes"."""
    link: float
    """ "that is" before a relation."""


def say(description: Description, style: Style, rng: np.random.Generator) -> str:
    """A sentence for ``description``: lower case, words separated by one space. All choices come from ``rng``."""
    return _Speaker(style, rng).sentence(description)


class _Speaker:
    def __init__(self, style: Style, rng: np.random.Generator) -> None:
        self.style = style
        self.rng = rng

    def sentence(self, description: Description) -> str:
        clause = description.clause
        link = self.style.link if clause is not None and clause.group == "relation" else 0.0
        after_noun = 0.0 if isinstance(clause, Compared) else self.style.after_noun
        noun = self._noun_phrase(description.traits, after_noun, relative=clause is None)
        if isinstance(clause, (Beside, Between)) and self.rng.random() < link:
            noun = f"{noun} {self._pick(lexicon.LINKS)}"
        text = noun if clause is None else self._clause_phrase(clause).format(n=noun, **self._anchors(clause))
        determiners = self.style.determiners
        if clause is not None:
            determiners = tuple(d for d in determiners if d != "the only")
        return _with_determiner(determiners[int(self.rng.integers(len(determiners)))], text)

    def _anchors(self, clause: Clause) -> dict[str, str]:
        if isinstance(clause, Between):
            return {"a": self._anchor(clause.first), "b": self._anchor(clause.second)}
        if isinstance(clause, (Beside, Nearest, SameAs)):
            return {"a": self._anchor(clause.anchor)}
        return {}

    def _anchor(self, description: Description) -> str:
        """Attributes of an anchor stay before its noun: after it they could be taken for the target's."""
        determiners = self.style.anchor_determiners
        determiner = determiners[int(self.rng.integers(len(determiners)))]
        return _with_determiner(determiner, self._noun_phrase(description.traits, after_noun=0.0))

    def _noun_phrase(self, traits: Sequence[Trait], after_noun: float, relative: bool = False) -> str:
        """A noun and its modifiers. Only with ``relative`` may a relative clause follow ("that is red"): nothing
        else comes after it then.
        """
        shape = next((t for t in traits if t.kind == "shape" and not t.negated), None)
        noun = self._pick(lexicon.NOUNS[shape.value] if shape else lexicon.ANY_NOUN)
        negated = [t for t in traits if t.negated]
        before = [t for kind in ("size", "texture", "colour") for t in traits if t.kind == kind and not t.negated]
        if self.style.terse:
            before = [before[int(i)] for i in self.rng.permutation(len(before))]
        after = [f"{self._pick(lexicon.NEGATIONS)} {self._complement(trait, rare=False)}" for trait in negated]
        movable = [t for t in before if relative or t.kind == "texture"]
        if movable and not negated and self.rng.random() < after_noun:
            moved = movable[int(self.rng.integers(len(movable)))]
            before.remove(moved)
            after = [self._after(moved, relative)]
        return " ".join([*(self._pick(lexicon.ADJECTIVES[t.value]) for t in before), noun, *after])

    def _complement(self, trait: Trait, rare: bool = True) -> str:
        """What follows "is": an adjective, or a noun with its article. Not ``rare``: never "not unstriped"."""
        if trait.kind == "shape":
            return _with_determiner("a", self._pick(lexicon.NOUNS[trait.value]))
        adjectives = lexicon.ADJECTIVES[trait.value]
        return self._pick(adjectives if rare else adjectives[:2])

    def _after(self, trait: Trait, relative: bool) -> str:
        if trait.kind == "texture" and (not relative or self.rng.random() < 0.6):
            return self._pick(lexicon.AFTER_NOUN[trait.value])
        return f"{self._pick(lexicon.LINKS)} {self._complement(trait)}"

    def _clause_phrase(self, clause: Clause) -> str:
        return self._pick(_clause_phrases(clause, self.style.terse))

    def _pick(self, phrases: tuple[str, ...]) -> str:
        if len(phrases) > 1 and self.rng.random() < self.style.synonym:
            return phrases[int(self.rng.integers(1, len(phrases)))]
        return phrases[0]


def _clause_phrases(clause: Clause, terse: bool) -> tuple[str, ...]:
    match clause:
        case Side(direction):
            return (lexicon.TERSE_SIDE if terse else lexicon.SIDE)[direction]
        case Extreme(direction):
            return (lexicon.TERSE_EXTREME if terse else lexicon.EXTREME)[direction]
        case Corner(vertical, horizontal):
            return (lexicon.TERSE_CORNER if terse else lexicon.CORNER)[f"{vertical} {horizontal}"]
        case Center():
            return lexicon.TERSE_CENTER if terse else lexicon.CENTER
        case Ordinal(rank, direction):
            return (lexicon.TERSE_ORDINAL if terse else lexicon.ORDINAL)[f"{lexicon.RANKS[rank]} {direction}"]
        case Beside(direction):
            return lexicon.BESIDE[direction]
        case Nearest(far=far):
            return lexicon.FARTHEST if far else lexicon.NEAREST
        case Between():
            return lexicon.BETWEEN
        case SameAs(kind):
            return lexicon.SAME_AS[kind]
        case Compared(size, of_two):
            return (lexicon.LARGER if of_two else lexicon.LARGEST)[size]
    raise TypeError(f"no words for {clause!r}")


def _with_determiner(determiner: str, text: str) -> str:
    if determiner == "a" and text[0] in "aeiou" and not text.startswith("one"):
        determiner = "an"
    return f"{determiner} {text}" if determiner else text
