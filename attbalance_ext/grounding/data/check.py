"""What lies in a folder of data: which data sets, in which format, how much of them, and what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from attbalance_ext.grounding.errors import UserError

from .annotations import Annotation
from .files import UNREADABLE, image_size, is_file
from .readers import Source, sources_under
from .wrong_boxes import kind_of

_NAMED = 3
"""So many images are named in one line."""
_UNBOUNDED = (2**31, 2**31)
"""Stands for the size of an image that is not there: its boxes cannot be outside."""


@dataclass
class SplitFound:
    sentences: int
    images: int
    missing: list[str]
    """Images that are not where they should be."""
    unreadable: list[str]
    """Images that are no images."""
    wrong_boxes: dict[str, int]
    """By kind, see ``wrong_boxes.KINDS``."""


@dataclass
class Found:
    """A data set in one format."""

    name: str
    format: str
    splits: dict[str, SplitFound] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    """What is not there or cannot be used, each with the exact path."""

    @property
    def complete(self) -> bool:
        """Every split that belongs to the data set can be read, and so can every image."""
        return bool(self.splits) and not self.missing


@dataclass
class Report:
    root: Path
    found: list[Found]
    expected: dict[str, str]
    """Data set and format -> its first file, for all of which nothing was found."""

    @property
    def usable(self) -> bool:
        """Whether some data set is complete."""
        return any(found.complete for found in self.found)

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        found = [{**asdict(each), "complete": each.complete} for each in self.found]
        return {"root": str(self.root), "usable": self.usable, "found": found, "expected": self.expected}


def check(root: Path, *, decode: bool = False) -> Report:
    """Look for every data set in every format under ``root`` and read all of its annotations.

    Images are looked for, and their headers read where the format does not know their size; with ``decode`` every
    image is decoded in full.

    Raises:
        UserError: there is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"root: there is no folder {root}")
    report = Report(root, [], {})
    broken: dict[Path, bool] = {}
    for source in sources_under(root):
        try:
            splits = source.splits()
        except UserError as error:
            report.found.append(Found(source.name, source.format, missing=[str(error)]))
            continue
        if splits:
            report.found.append(_look(source, splits, decode, broken))
        else:
            report.expected[f"{source.name} ({source.format})"] = str(source.expected("train"))
    if not any(found.format == "JSON lines" for found in report.found):
        report.expected["one's own (JSON lines)"] = str(root / "train.jsonl")
    return report


def _look(source: Source, splits: list[str], decode: bool, broken: dict[Path, bool]) -> Found:
    found = Found(source.name, source.format)
    for split in splits:
        try:
            result = found.splits[split] = _count(source.read(split), decode, broken)
        except UserError as error:
            found.missing.append(f"{split}: {error}")
            continue
        if not result.sentences:
            found.missing.append(f"{split}: {source.expected(split)} holds no annotation")
        for what, paths in (("missing", result.missing), ("unreadable", result.unreadable)):
            if paths:
                found.missing.append(f"{split}: {len(paths)} of {result.images} images are {what}: {_listed(paths)}")
    found.missing += [f"{split}: {source.expected(split)}" for split in source.usual if split not in splits]
    return found


def _count(annotations: list[Annotation], decode: bool, broken: dict[Path, bool]) -> SplitFound:
    """``broken``: images that were looked at already."""
    sizes = {annotation.image: annotation.size for annotation in annotations}
    missing = [path for path in sizes if not is_file(path)]
    for path in sizes.keys() - set(missing):
        try:
            sizes[path] = sizes[path] or image_size(path)
            if decode and path not in broken:
                broken[path] = not _decodes(path)
        except UserError:
            broken[path] = True
    kinds = Counter(kind_of(each.box, sizes[each.image] or _UNBOUNDED) for each in annotations)
    del kinds[None]
    return SplitFound(
        sentences=len(annotations),
        images=len(sizes),
        missing=_sorted(missing),
        unreadable=_sorted(path for path in sizes if broken.get(path)),
        wrong_boxes={kind: count for kind, count in kinds.items() if kind},
    )


def _decodes(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except UNREADABLE:
        return False
    return True


def _sorted(paths: Iterable[Path]) -> list[str]:
    return sorted(map(str, paths))


def _listed(paths: list[str]) -> str:
    return ", ".join(paths[:_NAMED]) + (", ..." if len(paths) > _NAMED else "")
