"""What lies in a folder of data: which data sets, in which format, how much of them, and what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attbalance_ext.grounding.errors import UserError

from .annotations import Annotation
from .files import is_file
from .images import image_size, read_rgb
from .readers import Source, sources_under
from .wrong_boxes import kind_of

Size = tuple[int, int]
"""(width, height) in pixels."""
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
    resized: list[str]
    """Images of another size than their annotations say; known of those that were decoded."""
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
    seen: dict[Path, Size | None] = {}
    for source in sources_under(root):
        try:
            splits = source.splits()
        except UserError as error:
            report.found.append(Found(source.name, source.format, missing=[str(error)]))
            continue
        if splits:
            report.found.append(_look(source, splits, decode, seen))
        else:
            report.expected[f"{source.name} ({source.format})"] = str(source.expected("train"))
    if not any(found.format == "JSON lines" for found in report.found):
        report.expected["one's own (JSON lines)"] = str(root / "train.jsonl")
    return report


def _look(source: Source, splits: list[str], decode: bool, seen: dict[Path, Size | None]) -> Found:
    found = Found(source.name, source.format)
    for split in splits:
        try:
            result = found.splits[split] = _count(source.read(split), decode, seen)
        except UserError as error:
            found.missing.append(f"{split}: {error}")
            continue
        if not result.sentences:
            found.missing.append(f"{split}: {source.expected(split)} holds no annotation")
        faults = {
            "missing": result.missing,
            "unreadable": result.unreadable,
            "of another size than annotated": result.resized,
        }
        for what, paths in faults.items():
            if paths:
                found.missing.append(f"{split}: {len(paths)} of {result.images} images are {what}: {_listed(paths)}")
    found.missing += [f"{split}: {source.expected(split)}" for split in source.usual if split not in splits]
    return found


def _count(annotations: list[Annotation], decode: bool, seen: dict[Path, Size | None]) -> SplitFound:
    """``seen``: the sizes of images that were decoded already; None is that of one that cannot be read."""
    sizes = {annotation.image: annotation.size for annotation in annotations}
    missing = [path for path in sizes if not is_file(path)]
    for path in sizes.keys() - set(missing):
        try:
            sizes[path] = sizes[path] or image_size(path)
            if decode and path not in seen:
                seen[path] = read_rgb(path).size
        except UserError:
            seen[path] = None
    resized = {a.image for a in annotations if a.size and seen.get(a.image) not in (None, a.size)}
    kinds = Counter(kind_of(each.box, sizes[each.image] or _UNBOUNDED) for each in annotations)
    del kinds[None]
    return SplitFound(
        sentences=len(annotations),
        images=len(sizes),
        missing=_sorted(missing),
        unreadable=_sorted(path for path in sizes if path in seen and seen[path] is None),
        resized=_sorted(resized),
        wrong_boxes={kind: count for kind, count in kinds.items() if kind},
    )


def _sorted(paths: Iterable[Path]) -> list[str]:
    return sorted(map(str, paths))


def _listed(paths: list[str]) -> str:
    return ", ".join(paths[:_NAMED]) + (", ..." if len(paths) > _NAMED else "")
