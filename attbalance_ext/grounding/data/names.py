"""Names of built-in data sets and splits."""

from __future__ import annotations

from dataclasses import dataclass

from attbalance_ext.grounding.errors import UserError

from .grammar import FLAVOURS

SPLITS = ("train", "val", "test", "test_novel")
FRESH_SPLITS = ("fresh", "fresh_novel")
"""Like test and test_novel, of scenes that nobody looked at while anything was designed: `attbalance experiment`
reports on them, and nothing else should."""


class UnknownData(UserError, ValueError):
    """A data set or split that does not exist. The message says which do."""


@dataclass(frozen=True)
class BuiltinName:
    """``builtin:<flavour>`` or ``builtin:<flavour>-hard``."""

    flavour: str
    hard: bool

    def __str__(self) -> str:
        return f"builtin:{self.flavour}{'-hard' if self.hard else ''}"

    @classmethod
    def parse(cls, name: str) -> BuiltinName:
        prefix, _, rest = name.partition(":")
        flavour = rest.removesuffix("-hard")
        if prefix != "builtin" or flavour not in FLAVOURS:
            known = ", ".join(f"builtin:{flavour}" for flavour in FLAVOURS)
            raise UnknownData(f"no data set {name!r}; there are {known}, and each with -hard added")
        return cls(flavour, hard=rest != flavour)


def check_split(split: str) -> None:
    known = SPLITS + FRESH_SPLITS
    if split not in known:
        raise UnknownData(f"no split {split!r}; there are {', '.join(known)}")
