"""Writing the built-in benchmark in the file formats that grounding data comes in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..dataset import load_arrays
from ..names import SPLITS, BuiltinName, UnknownData
from .jsonl import write_jsonl
from .refer import write_refer
from .split_files import write_split_files
from .view import SplitView

_WRITERS: dict[str, Callable[[Path, list[SplitView], bool], Path]] = {
    "split-files": write_split_files,
    "refer": write_refer,
    "jsonl": write_jsonl,
}
FORMATS = tuple(_WRITERS)


def export(
    name: str,
    root: Path,
    format: str = "split-files",
    *,
    cache: Path | None = None,
    size: int = 64,
    progress: bool = True,
) -> Path:
    """Write all splits of a built-in data set under ``root``: PNG images, and annotations in ``format``.

    "split-files": ReSC's and TransVG's ``<root>/<dataset>/<dataset>_<split>.pth``, see ``write_split_files``.
    "refer": the refer API's ``<root>/<dataset>/refs(<by>).p`` and ``instances.json``, see ``write_refer``.
    "jsonl": ``<root>/<split>.jsonl``, one sentence a line, see ``write_jsonl``.

    Data sets are called what the real one of that language is called: refcoco is "unc" or "refcoco", refcocog
    "gref_umd" or "refcocog", referit "referit" or "refclef". Where the real one has testA and testB, they are
    test and test_novel here. Files appear whole, annotations after the images they name.

    Returns:
        The directory that holds the annotations.

    Raises:
        ValueError: no such data set, size or format; the message says what exists.
    """
    parsed = BuiltinName.parse(name)
    if format not in _WRITERS:
        raise UnknownData(f"no export format {format!r}; there are {', '.join(_WRITERS)}")
    views = [
        SplitView(parsed, split, load_arrays(parsed, split, cache=cache, size=size, progress=progress), size)
        for split in SPLITS
    ]
    return _WRITERS[format](Path(root), views, progress)
