"""Small folders of data in the three formats, true to the published ones."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

COCO = "other/images/mscoco/images/train2014"
REFER_COCO = "images/mscoco/images/train2014"


def write_image(path: Path, size: tuple[int, int] = (64, 48), colour: tuple[int, int, int] = (200, 30, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def write_split(root: Path, dataset: str, split: str, rows: Iterable[tuple[Any, ...]]) -> Path:
    path = root / dataset / f"{dataset}_{split}.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(list(rows), path, _use_new_zipfile_serialization=False)
    return path


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def write_refer(
    root: Path, folder: str, by: str, entries: Iterable[tuple[str, str, list[float], list[str]]], protocol: int = 2
) -> Path:
    """``entries``: (split, image file, bbox, sentences), one for each object."""
    references: list[dict[str, Any]] = []
    images: dict[str, dict[str, Any]] = {}
    annotations: list[dict[str, Any]] = []
    for number, (split, name, bbox, sentences) in enumerate(entries, start=1):
        image = images.setdefault(name, {"id": len(images) + 1, "file_name": name, "width": 64, "height": 48})
        annotations.append({"id": number, "image_id": image["id"], "bbox": bbox, "category_id": 1})
        references.append(
            {
                "ref_id": number,
                "ann_id": number,
                "image_id": image["id"],
                "category_id": 1,
                "split": split,
                "file_name": f"{Path(name).stem}_{number}{Path(name).suffix}",  # as published: not the image's name
                "sent_ids": [],
                "sentences": [
                    {"sent_id": 0, "sent": each, "raw": each.upper(), "tokens": each.split()} for each in sentences
                ],
            }
        )
    file = root / folder / f"refs({by}).p"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(references, protocol))
    tables = {"images": list(images.values()), "annotations": annotations, "categories": []}
    (file.parent / "instances.json").write_text(json.dumps(tables))
    return file
