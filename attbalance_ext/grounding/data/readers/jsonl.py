"""JSON lines, the format for one's own data: one sentence a line."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from attbalance_ext.grounding.errors import UserError

from ..annotations import Annotation, parse_box, parse_size, parse_text
from .source import Source

_PLAIN = "jsonl"
"""The name of a folder's only data set, whose files carry no name."""


def _stems(root: Path) -> list[str]:
    """What the files' names are without their ending. (`glob` finds nothing in a folder that may not be read.)"""
    if not root.is_dir():
        return []
    return sorted(name.removesuffix(".jsonl") for name in os.listdir(root) if name.endswith(".jsonl"))


class JsonLines(Source):
    """``<root>/<name>.<split>.jsonl``, or ``<root>/<split>.jsonl`` where a folder holds one data set.

    A line is an object with image (path, relative to the file), sentence, bbox ([x, y, width, height] in pixels) and,
    if they are known, width and height of the image.
    """

    format = "JSON lines"
    usual = ("train", "val")

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root = root
        self.name = names[0]
        self._names = names

    @staticmethod
    def names_under(root: Path) -> list[str]:
        """The names of the data sets in ``root``; "jsonl" is that of files without one."""
        return list(dict.fromkeys(stem.rpartition(".")[0] or _PLAIN for stem in _stems(root)))

    def splits(self) -> list[str]:
        stems = (stem for stem in _stems(self.root) if stem.startswith(self._prefix))
        found = {split for stem in stems if "." not in (split := stem.removeprefix(self._prefix))}
        usual = [split for split in ("train", "val", "test", "testA", "testB", "trainval") if split in found]
        return usual + sorted(found - set(usual))

    def expected(self, split: str) -> Path:
        return self.root / f"{self._prefix}{split}.jsonl"

    @cached_property
    def _prefix(self) -> str:
        """What the files' names begin with: the data set's name, or nothing where no file bears it."""
        stems = _stems(self.root)
        prefixes = (f"{name}." for name in self._names)
        return next((prefix for prefix in prefixes if any(stem.startswith(prefix) for stem in stems)), "")

    def read(self, split: str) -> list[Annotation]:
        path = self.expected(split)
        found: list[Annotation] = []
        images: dict[str, Path] = {}
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                found.append(self._annotation(json.loads(line.decode("utf-8-sig")), images))
            except (ValueError, TypeError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: {error}") from None
        return found

    def _annotation(self, record: Any, images: dict[str, Path]) -> Annotation:
        if not isinstance(record, dict):
            raise ValueError(f"a line is an object with image, sentence and bbox, not a {type(record).__name__}")
        if missing := {"image", "sentence", "bbox"} - record.keys():
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        name = parse_text(record["image"], "image")
        image = images.setdefault(name, self.root / name)
        size = parse_size(record["width"], record["height"]) if {"width", "height"} <= record.keys() else None
        sentence = parse_text(record["sentence"], "sentence")
        return Annotation(image, sentence, parse_box(record["bbox"], corners=False), size)
