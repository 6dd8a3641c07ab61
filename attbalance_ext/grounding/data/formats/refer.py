"""The files of the refer API: references in a pickle, objects in COCO's JSON."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...files import replace_file, write_text
from ..attributes import SHAPES, VALUES
from .view import SplitView

Record = dict[str, Any]

_COCO_IMAGES = "images/mscoco/images/train2014"
_DATASETS = {
    "refcoco": ("refcoco", "unc", _COCO_IMAGES),
    "refcoco+": ("refcoco+", "unc", _COCO_IMAGES),
    "refcocog": ("refcocog", "umd", _COCO_IMAGES),
    "referit": ("refclef", "berkeley", "images/saiapr_tc-12"),
}
"""Flavour -> the folder, who split it, and where its images lie."""


def write_refer(root: Path, views: list[SplitView], progress: bool) -> Path:
    """Write ``<root>/<dataset>/refs(<by>).p`` and ``instances.json``, and images under ``<root>/images``.

    References are plain dictionaries with ref_id, ann_id, image_id, category_id, split, file_name, sent_ids and
    sentences (sent_id, sent, raw, tokens); the sentences about one object are together. Categories are the
    shapes. Ids count from 1. Segmentations are empty.
    """
    dataset, by, images = _DATASETS[views[0].name.flavour]
    tests = ("testA", "testB") if by == "unc" else ("test", "test_novel")
    names = {"train": "train", "val": "val", "test": tests[0], "test_novel": tests[1]}
    instances = _Instances()
    references: list[Record] = []
    for view in views:
        view.write_images(root / images, progress)
        references += _references(view, names[view.split], instances.add(view))
    for number, reference in enumerate(references, start=1):
        reference["ref_id"] = number
    _number_sentences(references)
    write_text(root / dataset / "instances.json", json.dumps(instances.tables))
    replace_file(root / dataset / f"refs({by}).p", partial(pickle.dump, references, protocol=2))
    return root / dataset


class _Instances:
    """COCO's tables of images, annotations and categories."""

    def __init__(self) -> None:
        categories = [{"id": i, "name": shape, "supercategory": "shape"} for i, shape in enumerate(SHAPES, start=1)]
        self.tables: dict[str, list[Record]] = {"images": [], "annotations": [], "categories": categories}

    def add(self, view: SplitView) -> Callable[[int, int], Record]:
        """Append a split's scenes and objects; returns a look-up (scene, object) -> annotation."""
        annotations: dict[tuple[int, int], Record] = {}
        shapes = view.arrays["object_labels"][..., list(VALUES).index("shape")]
        for scene, row in enumerate(shapes):
            image = {"file_name": view.image_name(scene), "width": view.size, "height": view.size}
            image_id = self._append("images", image)["id"]
            for slot in np.flatnonzero(row >= 0).tolist():
                box = view.xywh(view.arrays["object_boxes"][scene, slot])
                annotation = {
                    "image_id": image_id,
                    "category_id": int(row[slot]) + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "segmentation": [],
                }
                annotations[scene, slot] = self._append("annotations", annotation)
        return lambda scene, slot: annotations[scene, slot]

    def _append(self, table: str, record: Record) -> Record:
        record["id"] = len(self.tables[table]) + 1
        self.tables[table].append(record)
        return record


def _references(view: SplitView, split: str, annotation_of: Callable[[int, int], Record]) -> list[Record]:
    """One record per object spoken of, in order of first mention, not yet numbered."""
    found: dict[int, Record] = {}
    for scene, target, _, sentence in view.rows():
        annotation = annotation_of(scene, target)
        reference = found.setdefault(
            annotation["id"],
            {
                "ann_id": annotation["id"],
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "split": split,
                "file_name": view.image_name(scene),
                "sentences": [],
            },
        )
        reference["sentences"].append({"sent": sentence, "raw": sentence, "tokens": sentence.split()})
    return list(found.values())


def _number_sentences(references: list[Record]) -> None:
    number = 0
    for reference in references:
        for sentence in reference["sentences"]:
            number += 1
            sentence["sent_id"] = number
        reference["sent_ids"] = [sentence["sent_id"] for sentence in reference["sentences"]]
