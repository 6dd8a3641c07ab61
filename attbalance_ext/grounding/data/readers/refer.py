"""The refer API's files: references in a pickle, images and boxes in COCO's JSON."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from attbalance_ext.grounding.errors import UserError

from ..annotations import Annotation, Box, parse_box, parse_size, parse_text
from ..benchmarks import Benchmark
from ..pickles import load_pickle
from .source import Source, image_folder, read_rows


class _Image(NamedTuple):
    file_name: str
    size: tuple[int, int]


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
        self.usual = benchmark.splits
        folders = benchmark.refer_folders(root)
        folder_here = next((each for each in folders if (each / f"refs({by}).p").is_file()), folders[0])
        self.references = folder_here / f"refs({by}).p"
        self.instances = folder_here / "instances.json"

    def splits(self) -> list[str]:
        if not self.references.is_file():
            return []
        found = {reference["split"] for reference in self._references}
        usual = [split for split in self.benchmark.splits if split in found]
        return usual + sorted(found - set(usual))

    def expected(self, split: str) -> Path:
        return self.references

    def read(self, split: str) -> list[Annotation]:
        chosen = [reference for reference in self._references if reference["split"] == split]
        rows = [row for rows in read_rows(self.references, chosen, self._sentences) for row in rows]
        if not rows:
            return []
        folder = image_folder(self.benchmark.image_folders(self.root), rows[0][0].file_name)
        paths = {image.file_name: folder / image.file_name for image, _, _ in rows}
        return [Annotation(paths[image.file_name], sentence, box, image.size) for image, sentence, box in rows]

    def _sentences(self, reference: dict[str, Any]) -> list[tuple[_Image, str, Box]]:
        """A reference's sentences, each with its image and box."""
        images, boxes = self._tables
        image, bbox = images.get(reference["image_id"]), boxes.get(reference["ann_id"])
        if image is None or bbox is None:
            raise ValueError(f"its image or its annotation is not in {self.instances}")
        box = parse_box(bbox, corners=False)
        return [(image, parse_text(sentence["sent"], "a sentence"), box) for sentence in reference["sentences"]]

    @cached_property
    def _references(self) -> list[dict[str, Any]]:
        """All references, each a dictionary that has a split."""
        loaded = load_pickle(self.references)
        if not isinstance(loaded, list):
            raise UserError(f"{self.references} holds a {type(loaded).__name__}; it is to be a list of references")
        found = read_rows(self.references, loaded, _reference)
        # A pickle may name one list of sentences from many references.
        sentences, size = sum(len(reference["sentences"]) for reference in found), self.references.stat().st_size
        if sentences > size:
            said = f"the same sentences are used again and again, {sentences} in {size} bytes"
            raise UserError(f"{self.references}: {said}")
        return found

    @cached_property
    def _tables(self) -> tuple[dict[Any, _Image], dict[Any, Any]]:
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
        images = read_rows(path, tables["images"], lambda entry: (_id(entry), _image(entry)))
        boxes = read_rows(path, tables["annotations"], lambda entry: (_id(entry), entry["bbox"]))
        return dict(images), dict(boxes)


def _reference(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"a reference is a dictionary, not a {type(entry).__name__}")
    if missing := {"ann_id", "image_id", "split", "sentences"} - entry.keys():
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    for key in ("ann_id", "image_id"):
        _id({"id": entry[key]})
    if not isinstance(entry["sentences"], list):
        raise ValueError(f"its sentences are a list, not a {type(entry['sentences']).__name__}")
    return {**entry, "split": parse_text(entry["split"], "a split")}


def _id(entry: dict[str, Any]) -> int | str:
    if not isinstance(entry["id"], int | str):
        raise ValueError(f"an id is a number, not a {type(entry['id']).__name__}")
    return entry["id"]


def _image(entry: dict[str, Any]) -> _Image:
    return _Image(parse_text(entry["file_name"], "an image file"), parse_size(entry["width"], entry["height"]))
