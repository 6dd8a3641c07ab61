"""Scenes and references of the built-in benchmark, a few at a time."""

from __future__ import annotations

from functools import cache

from attbalance_ext.grounding.data.generate import Reference, scene_and_references
from attbalance_ext.grounding.data.grammar import FLAVOURS
from attbalance_ext.grounding.data.names import BuiltinName
from attbalance_ext.grounding.data.scene import Scene

NAMES = [BuiltinName(flavour, hard) for flavour in FLAVOURS for hard in (False, True)]


@cache
def examples(name: BuiltinName, split: str, scenes: int) -> list[tuple[Scene, Reference]]:
    found = []
    for index in range(scenes):
        scene, references = scene_and_references(name, split, index)
        found += [(scene, reference) for reference in references]
    return found
