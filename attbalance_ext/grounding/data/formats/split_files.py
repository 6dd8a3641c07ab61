"""The split files of ReSC, which TransVG, VLTVG and QRNet read."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from ...files import replace_file
from ..attributes import VALUES
from .view import SplitView

_COCO_IMAGES = "other/images/mscoco/images/train2014"
_DATASETS = {
    "refcoco": ("unc", _COCO_IMAGES),
    "refcoco+": ("unc+", _COCO_IMAGES),
    "refcocog": ("gref_umd", _COCO_IMAGES),
    "referit": ("referit", "referit/images"),
}
"""Flavour -> the name of the data set, and where its images lie."""
_TEST_NAMES = {"unc": ("testA", "testB"), "unc+": ("testA", "testB")}


def write_split_files(root: Path, views: list[SplitView], progress: bool) -> Path:
    """Write ``<root>/<dataset>/<dataset>_<split>.pth``, and images under ``<root>/other`` or ``<root>/referit``.

    A file is a list of tuples (image file, mask file, bbox, phrase, attributes). bbox is [x, y, width, height]
    in pixels, for referit [x1, y1, x2, y2]. Masks are named and not written. Attributes are [kind, value] pairs of
    the target. trainval is train followed by val.
    """
    dataset, images = _DATASETS[views[0].name.flavour]
    test, novel = _TEST_NAMES.get(dataset, ("test", "test_novel"))
    names = {"train": "train", "val": "val", "test": test, "test_novel": novel}
    files: dict[str, list[tuple[Any, ...]]] = {}
    for view in views:
        view.write_images(root / images, progress)
        files[names[view.split]] = _tuples(view, corners=dataset == "referit")
    files["trainval"] = files["train"] + files["val"]
    for split, rows in files.items():
        replace_file(root / dataset / f"{dataset}_{split}.pth", partial(_save_legacy, rows))
    return root / dataset


def _tuples(view: SplitView, corners: bool) -> list[tuple[Any, ...]]:
    labels = view.arrays["object_labels"]
    rows: list[tuple[Any, ...]] = []
    for scene, target, box, sentence in view.rows():
        image = view.image_name(scene)
        mask = f"{Path(image).stem}_{target}.pth"
        attributes = [[kind, VALUES[kind][i]] for kind, i in zip(VALUES, labels[scene, target], strict=True)]
        rows.append((image, mask, view.xyxy(box) if corners else view.xywh(box), sentence, attributes))
    return rows


def _save_legacy(rows: list[tuple[Any, ...]], file: IO[bytes]) -> None:
    """In the format of PyTorch before 1.6, which the published files have."""
    torch.save(rows, file, _use_new_zipfile_serialization=False)
