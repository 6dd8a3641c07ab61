"""Export: what is written reads back, in the way readers of each format read it."""

from __future__ import annotations

import json
import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attbalance_ext.grounding.data import SPLITS, GroundingDataset, export, generate, load_dataset
from attbalance_ext.grounding.data.attributes import VALUES

FLAVOURS = ["refcoco", "refcoco+-hard", "refcocog", "referit"]


@pytest.fixture(autouse=True)
def _few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    for split in SPLITS:
        monkeypatch.setitem(generate.SCENES, split, 6)


@pytest.fixture
def data(flavour: str, tmp_path: Path) -> dict[str, GroundingDataset]:
    name = f"builtin:{flavour}"
    return {split: load_dataset(name, split, cache=tmp_path / "cache", progress=False) for split in SPLITS}


def write(flavour: str, format: str, tmp_path: Path) -> Path:
    return export(f"builtin:{flavour}", tmp_path / "root", format, cache=tmp_path / "cache", progress=False)


def same_image(path: Path, expected: torch.Tensor) -> bool:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert not image.info  # no text that could tell something about the target
        return np.array_equal(np.asarray(image), expected.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_split_files(flavour: str, data: dict[str, GroundingDataset], tmp_path: Path) -> None:
    folder = write(flavour, "split-files", tmp_path)
    dataset = folder.name
    expected_names = {"refcoco": "unc", "refcoco+-hard": "unc+", "refcocog": "gref_umd", "referit": "referit"}
    assert dataset == expected_names[flavour]
    names = dict(zip(SPLITS, ("train", "val", "testA", "testB"), strict=True)) if "unc" in dataset else {}
    images = "referit/images" if dataset == "referit" else "other/images/mscoco/images/train2014"
    loaded = {}
    for split in SPLITS:
        file = folder / f"{dataset}_{names.get(split, split)}.pth"
        rows = loaded[split] = torch.load(file, weights_only=True)
        assert file.read_bytes()[:2] != b"PK"  # the format before archives
        assert len(rows) == len(data[split])
        for index, (image, mask, box, phrase, attributes) in enumerate(rows):
            sample = data[split][index]
            assert phrase == sample.sentence
            assert mask.endswith(".pth")
            assert {kind for kind, _ in attributes} == {"shape", "colour", "size", "texture"}
            assert same_image(tmp_path / "root" / images / image, sample.image)
            x1, y1, third, fourth = box
            width, height = (third - x1, fourth - y1) if dataset == "referit" else (third, fourth)
            center = [(x1 + width / 2) / 64, (y1 + height / 2) / 64, width / 64, height / 64]
            assert center == pytest.approx(sample.box.tolist(), abs=1e-6)
    assert torch.load(folder / f"{dataset}_trainval.pth", weights_only=True) == loaded["train"] + loaded["val"]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_refer(flavour: str, data: dict[str, GroundingDataset], tmp_path: Path) -> None:
    folder = write(flavour, "refer", tmp_path)
    (refs_file,) = folder.glob("refs(*).p")
    content = refs_file.read_bytes()
    assert not {"GLOBAL", "STACK_GLOBAL", "REDUCE"} & {op.name for op, _, _ in pickletools.genops(content)}
    refs = pickle.loads(content)
    instances = json.loads((folder / "instances.json").read_text())
    images = {image["id"]: image for image in instances["images"]}
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    categories = {category["id"]: category["name"] for category in instances["categories"]}
    assert len(images) == 24
    assert len({image["file_name"] for image in images.values()}) == 24
    assert len({ref["ref_id"] for ref in refs}) == len(refs)
    image_folder = "images/saiapr_tc-12" if flavour == "referit" else "images/mscoco/images/train2014"
    names = dict(zip(SPLITS, ("train", "val", "testA", "testB"), strict=True)) if "unc" in refs_file.name else {}
    objects = data["train"].objects
    shapes = [
        [VALUES["shape"][label] for label in row[there].tolist()]
        for row, there in zip(objects.shape, objects.present, strict=True)
    ]
    found: list[list[str]] = [[] for _ in shapes]
    for annotation in annotations.values():
        name = images[annotation["image_id"]]["file_name"]
        if "_train_" in name:
            found[int(name[-10:-4])].append(categories[annotation["category_id"]])
    assert found == shapes
    seen_ids: list[int] = []
    for split in SPLITS:
        written = []
        for ref in (ref for ref in refs if ref["split"] == names.get(split, split)):
            annotation = annotations[ref["ann_id"]]
            assert annotation["image_id"] == ref["image_id"]
            assert images[ref["image_id"]]["file_name"] == ref["file_name"]
            assert annotation["category_id"] == ref["category_id"]
            assert categories[ref["category_id"]] in ("circle", "square", "triangle", "diamond", "cross")
            assert annotation["area"] == pytest.approx(annotation["bbox"][2] * annotation["bbox"][3])
            assert ref["sent_ids"] == [sentence["sent_id"] for sentence in ref["sentences"]]
            seen_ids += ref["sent_ids"]
            x, y, width, height = annotation["bbox"]
            for sentence in ref["sentences"]:
                assert sentence["tokens"] == sentence["sent"].split()
                written.append((sentence["sent"], round(x + width / 2, 3), round(y + height / 2, 3), width, height))
        pixels = (data[split].boxes.double() * 64).tolist()
        expected = [
            (sentence, round(cx, 3), round(cy, 3), width, height)
            for sentence, (cx, cy, width, height) in zip(data[split].sentences, pixels, strict=True)
        ]
        assert sorted(written) == sorted(expected)
        first = next(ref for ref in refs if ref["split"] == names.get(split, split))
        scene = int(first["file_name"][-10:-4])
        assert same_image(tmp_path / "root" / image_folder / first["file_name"], data[split].images[scene])
    assert len(seen_ids) == len(set(seen_ids))


@pytest.mark.parametrize("flavour", FLAVOURS[:1])
def test_json_lines(flavour: str, data: dict[str, GroundingDataset], tmp_path: Path) -> None:
    folder = write(flavour, "jsonl", tmp_path)
    for split in SPLITS:
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        assert len(rows) == len(data[split])
        for index, row in enumerate(rows):
            assert row.keys() == {"image", "sentence", "bbox"}
            sample = data[split][index]
            assert row["sentence"] == sample.sentence
            assert same_image(folder / row["image"], sample.image)
            x, y, width, height = row["bbox"]
            box = [(x + width / 2) / 64, (y + height / 2) / 64, width / 64, height / 64]
            assert box == pytest.approx(sample.box.tolist(), abs=1e-6)


def test_flavours_share_a_root_without_touching_each_other(tmp_path: Path) -> None:
    for flavour in ("refcoco", "refcoco-hard", "refcoco+", "refcocog"):
        write(flavour, "split-files", tmp_path)
    images = list((tmp_path / "root/other/images/mscoco/images/train2014").iterdir())
    assert len(images) == 4 * 4 * 6
    assert all(path.suffix == ".png" for path in images)


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no export format 'coco'; there are split-files, refer, jsonl"):
        export("builtin:refcoco", tmp_path, "coco")
    assert not list(tmp_path.iterdir())
