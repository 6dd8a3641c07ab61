"""The refer API's files: references in a pickle, images and boxes in COCO's JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attbalance_ext.grounding.errors import UserError

from ..annotations import Annotation, parse_box, parse_text
from ..benchmarks import Benchmark
from ..pickles import load_pickle
from .source import Source, image_folder, read_rows


class ReferFiles(Source):
    """``<root>/<folder>/refs(<by>).p`` and ``instances.json`` beside it, also under ``<root>/data``.

    The image is that of ``instances.json``: a reference's own file_name may carry the object's number. The sentence
    is "sent".
    """

    format = "refer"

    def __init__(self, root: Path, benchmark: Benchmark, folder: str, by: str) -> None:
        self.root = root
        self.benchmark = benchmark
        self.name = benchmark.name
        folders = benchmark.refer_folders(root)
        folder_here = next((each for each in folders if (each / f"refs({by}).p").is_file()), folders[0])
        self.references = folder_here / f"refs({by}).p"
        self.instances = folder_here / "instances.json"
        self._loaded: list[dict[str, Any]] | None = None

    def splits(self) -> list[str]:
        if not self.references.is_file():
            return []
        found = {reference["split"] for reference in self._references()}
        usual = [split for split in self.benchmark.splits if split in found]
        return usual + sorted(found - set(usual))

    def expected(self, split: str) -> Path:
        return self.references

    def read(self, split: str) -> list[Annotation]:
        chosen = [reference for reference in self._references() if reference["split"] == split]
        images, boxes = self._tables()
        if not chosen:
            return []

        def annotations(reference: dict[str, Any]) -> list[Annotation]:
            image, box = images[reference["image_id"]], boxes[reference["ann_id"]]
            corners = parse_box(box, corners=False)
            path = folder / image["file_name"]
            size = (int(image["width"]), int(image["height"]))
            return [
                Annotation(path, parse_text(sentence["sent"], "a sentence"), corners, size)
                for sentence in reference["sentences"]
            ]

        first = images.get(chosen[0]["image_id"], {}).get("file_name", "")
        folder = image_folder(self.benchmark.image_folders(self.root), first)
        return [row for rows in read_rows(self.references, chosen, annotations) for row in rows]

    def _references(self) -> list[dict[str, Any]]:
        """All references, each a dictionary that has a split; read once."""
        if self._loaded is None:
            loaded = load_pickle(self.references)
            if not isinstance(loaded, list):
                raise UserError(f"{self.references} holds a {type(loaded).__name__}; it is to be a list of references")
            self._loaded = read_rows(self.references, loaded, _reference)
        return self._loaded

    def _tables(self) -> tuple[dict[int, dict[str, Any]], dict[int, list[float]]]:
        """Images by id and boxes by the annotation's id."""
        path = self.instances
        try:
            tables = json.loads(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is no JSON: {error}") from None
        if not isinstance(tables, dict) or not {"images", "annotations"} <= tables.keys():
            raise UserError(f"{path} has no 'images' and 'annotations'")
        images = read_rows(path, tables["images"], lambda image: (image["id"], _image(image)))
        boxes = read_rows(path, tables["annotations"], lambda entry: (entry["id"], entry["bbox"]))
        return dict(images), dict(boxes)


def _reference(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"a reference is a dictionary, not a {type(entry).__name__}")
    if missing := {"ann_id", "image_id", "split", "sentences"} - entry.keys():
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    parse_text(entry["split"], "a split")
    return entry


def _image(entry: dict[str, Any]) -> dict[str, Any]:
    parse_text(entry["file_name"], "an image file")
    return {"file_name": entry["file_name"], "width": entry["width"], "height": entry["height"]}
