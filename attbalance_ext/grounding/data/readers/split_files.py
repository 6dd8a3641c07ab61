"""The split files of ReSC, TransVG, VLTVG and QRNet: one list of tuples a split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attbalance_ext.grounding.errors import UserError

from ..annotations import Annotation, Box, parse_box, parse_text
from ..benchmarks import Benchmark
from ..pickles import load_saved
from .source import Source, image_folder, read_rows


class SplitFiles(Source):
    """``<root>/<dataset>/<dataset>_<split>.pth``, also under ``<root>/data`` or ``<root>/ln_data``.

    A tuple is (image file, mask file, bbox, phrase, attributes), or (image file, bbox, phrase) for flickr.
    """

    format = "split files"

    def __init__(self, root: Path, benchmark: Benchmark) -> None:
        self.root = root
        self.benchmark = benchmark
        self.name = benchmark.name
        self.usual = benchmark.splits
        folders = benchmark.split_folders(root)
        self.folder = next((folder for folder in folders if any(folder.glob(f"{self.name}_*.pth"))), folders[0])

    def splits(self) -> list[str]:
        found = {path.stem.removeprefix(f"{self.name}_") for path in self.folder.glob(f"{self.name}_*.pth")}
        usual = [split for split in (*self.benchmark.splits, "trainval") if split in found]
        return usual + sorted(found - set(usual))

    def expected(self, split: str) -> Path:
        return self.folder / f"{self.name}_{split}.pth"

    def read(self, split: str) -> list[Annotation]:
        path = self.expected(split)
        rows = load_saved(path)
        if not isinstance(rows, list):
            raise UserError(f"{path} holds a {type(rows).__name__}; a split file is a list of tuples")
        found = read_rows(path, rows, self._row)
        if not found:
            return []
        folder = image_folder(self.benchmark.image_folders(self.root), found[0][0])
        images = {name: folder / name for name, _, _ in found}
        return [Annotation(images[name], sentence, box) for name, box, sentence in found]

    def _row(self, row: Any) -> tuple[str, Box, str]:
        if not isinstance(row, tuple | list) or len(row) not in (3, 5):
            raise ValueError("it is no tuple of 5 (image, mask, bbox, phrase, attributes) or 3 (image, bbox, phrase)")
        image, box, phrase = row if len(row) == 3 else (row[0], row[2], row[3])
        corners = self.benchmark.corners
        return parse_text(image, "an image file"), parse_box(box, corners=corners), parse_text(phrase, "a phrase")
