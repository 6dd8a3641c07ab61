"""Making a split: scenes, images and sentences, every scene from its own seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .attributes import VALUES, is_held_out
from .expression import GROUPS, Description
from .grammar import FLAVOURS, Flavour
from .names import BuiltinName
from .phrase import say
from .render import render
from .scene import CANVAS, HARD, STANDARD, Scene, sample_scene

SEEDS = {"train": 20_011, "val": 20_021, "test": 77_003, "test_novel": 77_017, "fresh": 91_009, "fresh_novel": 91_033}
"""One seed per split. The scenes, grammar and trainer were designed by looking at train and val only."""
SCENES = {"train": 8000, "val": 1000, "test": 1200, "test_novel": 900, "fresh": 2000, "fresh_novel": 1500}
SENTENCES_PER_SCENE = 3
ATTEMPTS = 6
"""How often a description of one object is attempted before another object is taken."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Reference:
    """A sentence, what it means, and the object of the scene it means."""

    target: int
    description: Description
    sentence: str


def scene_and_references(name: BuiltinName, split: str, index: int) -> tuple[Scene, list[Reference]]:
    """Scene ``index`` of a split: always the same, whatever else is generated."""
    flavour = FLAVOURS[name.flavour]
    seed = [SEEDS[split], list(FLAVOURS).index(name.flavour), int(name.hard), index]
    rng = np.random.default_rng(seed)
    novel = split.endswith("_novel")
    scene = sample_scene(rng, HARD if name.hard else STANDARD, novel)
    targets = [int(i) for i in rng.permutation(len(scene.objects))]
    if novel:
        # Mostly one object a scene is new: say two things about it.
        targets = 2 * [i for i in targets if is_held_out(scene.objects[i].combination)]
    return scene, _references(rng, flavour, scene, targets)


def _references(rng: np.random.Generator, flavour: Flavour, scene: Scene, targets: list[int]) -> list[Reference]:
    found: list[Reference] = []
    for target in targets[:SENTENCES_PER_SCENE]:
        for _ in range(ATTEMPTS):
            description = flavour.describe(rng, scene, target)
            if description is None:
                continue
            sentence = say(description, flavour.style, rng)
            if all(sentence != earlier.sentence for earlier in found):
                found.append(Reference(target, description, sentence))
                break
    return found


def generate(name: BuiltinName, split: str, size: int, scenes: int) -> Iterator[Arrays]:
    """Yield one dictionary of arrays per scene; ``gather`` puts them together."""
    slots = (HARD if name.hard else STANDARD).count[1]
    for index in range(scenes):
        scene, references = scene_and_references(name, split, index)
        boxes, labels = _object_arrays(scene, slots)
        targets = np.array([r.target for r in references], dtype=np.int64)
        yield {
            "images": np.ascontiguousarray(render(scene, size).transpose(2, 0, 1)),
            "object_boxes": boxes,
            "object_labels": labels,
            "target": targets,
            "scene_index": np.full(len(references), index, dtype=np.int64),
            "boxes": boxes[targets],
            "clause": np.array([_group(r.description) for r in references], dtype=np.int8),
            "needed": np.array([_needs_clause(r.description, scene) for r in references], dtype=bool),
            "text": np.frombuffer("".join(f"{r.sentence}\n" for r in references).encode(), dtype=np.uint8),
        }


def gather(parts: list[Arrays]) -> Arrays:
    """Stack what is per scene, concatenate what is per sentence.

    images (S, 3, H, W) uint8; object_boxes (S, K, 4) float32 cxcywh, 0 where there is no object; object_labels
    (S, K, 4) int8 in the order of ``VALUES``, -1 where there is none; target, scene_index (n,) int64;
    boxes (n, 4) float32; clause (n,) int8, a position in ``GROUPS`` or -1; needed (n,) bool; text: the
    sentences in UTF-8, each ended by a newline.
    """
    per_scene = ("images", "object_boxes", "object_labels")
    return {k: (np.stack if k in per_scene else np.concatenate)([part[k] for part in parts]) for k in parts[0]}


def content_version() -> str:
    """Changes whenever a module that decides the content changes: a cache made by other code is never read."""
    digest = hashlib.sha256()
    modules = ("attributes", "expression", "generate", "grammar", "lexicon", "phrase", "render", "scene")
    for module in modules:
        digest.update(Path(__file__).with_name(f"{module}.py").read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:10]


def _object_arrays(scene: Scene, slots: int) -> tuple[np.ndarray, np.ndarray]:
    boxes = np.zeros((slots, 4), dtype=np.float32)
    labels = np.full((slots, len(VALUES)), -1, dtype=np.int8)
    for index, item in enumerate(scene.objects):
        x1, y1, x2, y2 = item.box
        boxes[index] = np.array([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]) / CANVAS
        labels[index] = [VALUES[kind].index(value) for kind, value in zip(VALUES, item.combination, strict=True)]
    return boxes, labels


def _group(description: Description) -> int:
    return -1 if description.clause is None else GROUPS.index(description.clause.group)


def _needs_clause(description: Description, scene: Scene) -> bool:
    """True where the sentence without its clause would fit several objects."""
    return description.clause is not None and description.candidates(scene).bit_count() > 1
