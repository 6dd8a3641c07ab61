"""`attbalance data check`: what is there is counted, what is missing is named with its path."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers_files import COCO, REFER_COCO, write_image, write_lines, write_refer, write_split
from PIL import Image

from attbalance_ext import cli
from attbalance_ext.grounding.data import FORMATS, SPLITS, export, generate


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["attbalance", "data", "check", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """(exit code, what it says) of the command, its text and its JSON having the same exit code."""

    def run(root: Path, *options: str) -> tuple[int, str, dict[str, Any]]:
        code = call(monkeypatch, root, *options)
        text = capsys.readouterr().out
        assert call(monkeypatch, root, "--json", *options) == code
        return code, text, json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Any, format: str) -> None:
    for split in SPLITS:
        monkeypatch.setitem(generate.SCENES, split, 4)
    export("builtin:refcoco", tmp_path / "root", format, cache=tmp_path / "cache", progress=False)
    code, text, report = check(tmp_path / "root", "--images")
    assert code == 0
    (found,) = report["found"]
    assert found["name"] == ("jsonl" if format == "jsonl" else "unc")
    assert found["complete"]
    assert {split["images"] for name, split in found["splits"].items() if name != "trainval"} == {4}
    lines = text.splitlines()
    assert lines[0] == f"{found['name']} ({found['format']}): complete"
    assert f"  train: {found['splits']['train']['sentences']} sentences, 4 images, wrong boxes: none" in lines
    assert "missing" not in text


def test_an_empty_folder(tmp_path: Path, check: Any) -> None:
    code, text, report = check(tmp_path)
    assert (code, report["found"], report["usable"]) == (1, [], False)
    for file in ("unc/unc_train.pth", "refcocog/refs(google).p", "flickr/flickr_train.pth", "train.jsonl"):
        assert f": {tmp_path / file}\n" in text


def test_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, tmp_path / "none") == 2
    assert capsys.readouterr().err == f"attbalance: root: there is no folder {tmp_path / 'none'}\n"


def row(image: str, box: list[float]) -> tuple[Any, ...]:
    return (image, "m", box, "x", [])


def test_missing_splits_and_images_have_their_exact_paths(tmp_path: Path, check: Any) -> None:
    write_image(tmp_path / COCO / "a.jpg")
    write_split(tmp_path, "gref_umd", "train", [row("a.jpg", [0, 0, 5, 5]), row("a.jpg", [0, 0, -5, 5])])
    write_split(tmp_path, "gref_umd", "val", [row("a.jpg", [0, 0, 5, 5]), row("b.jpg", [0, 0, 500, 5])])
    code, text, report = check(tmp_path)
    assert code == 1
    (found,) = report["found"]
    assert not found["complete"]
    assert found["splits"]["train"]["wrong_boxes"] == {"inverted": 1}
    assert found["splits"]["val"]["wrong_boxes"] == {}  # nobody knows how large b.jpg is
    assert text.splitlines() == [
        "gref_umd (split files): not complete",
        "  train: 2 sentences, 1 images, wrong boxes: 1 inverted",
        "  val: 2 sentences, 2 images, wrong boxes: none",
        f"  missing: val: 1 of 2 images are missing: {tmp_path / COCO / 'b.jpg'}",
        f"  missing: test: {tmp_path / 'gref_umd/gref_umd_test.pth'}",
        "no data set is complete",
    ]


def test_one_complete_data_set_is_enough(tmp_path: Path, check: Any) -> None:
    write_image(tmp_path / REFER_COCO / "a.jpg")
    write_split(tmp_path, "unc", "train", [row("a.jpg", [0, 0, 5, 5])])
    entries = [(split, "a.jpg", [1.0, 1, 5, 5], ["x", "y"]) for split in ("train", "val")]
    write_refer(tmp_path, "refcocog", "google", entries)
    write_lines(tmp_path / "own.test.jsonl", [{"image": f"{REFER_COCO}/a.jpg", "sentence": "x", "bbox": [1, 1, 5, 5]}])
    code, text, report = check(tmp_path)
    assert code == 0
    found = {(each["name"], each["format"]): each["complete"] for each in report["found"]}
    assert found == {("unc", "split files"): False, ("gref", "refer"): True, ("own", "JSON lines"): False}
    assert f"  missing: train: {tmp_path / 'own.train.jsonl'}" in text


def test_damaged_files_are_told_and_the_rest_is_read(tmp_path: Path, check: Any) -> None:
    write_image(tmp_path / COCO / "a.jpg")
    for split in ("train", "val"):
        write_split(tmp_path, "gref", split, [row("a.jpg", [0, 0, 5, 5])])
    (tmp_path / "gref/gref_val.pth").write_bytes(b"cos\nsystem\n.")
    write_refer(tmp_path, "refcoco", "unc", [("train", "a.jpg", [1, 1, 5, 5], ["x"])])
    (tmp_path / "refcoco/instances.json").unlink()
    code, text, _ = check(tmp_path)
    assert code == 1
    assert f"missing: val: {tmp_path / 'gref/gref_val.pth'} is refused, nothing in it was run" in text
    assert f"missing: train: {tmp_path / 'refcoco/instances.json'} cannot be read: No such file" in text
    (tmp_path / "refcoco/refs(unc).p").write_bytes(b"")
    assert f"missing: {tmp_path / 'refcoco/refs(unc).p'} is damaged" in check(tmp_path)[1]


def test_images_of_another_size_are_found_by_decoding(tmp_path: Path, check: Any) -> None:
    """Each annotation has a size of its own, also of one image in two splits."""
    write_image(tmp_path / "a.png", (64, 48))
    write_image(tmp_path / "b.png", (48, 64))
    sizes: dict[str, list[dict[str, int]]] = {
        "train": [{"width": 64, "height": 48}, {"width": 48, "height": 64}],
        "val": [{"width": 64, "height": 48}, {}],
        "test": [{"width": 48, "height": 64}, {"width": 48, "height": 64}],
    }
    for split, (a, b) in sizes.items():
        rows = [{"image": "a.png", **a}, {"image": "b.png", **b}, {"image": "a.png", "width": 64, "height": 48}]
        write_lines(tmp_path / f"{split}.jsonl", [{"sentence": "x", "bbox": [1, 1, 5, 5], **row} for row in rows])
    assert check(tmp_path)[0] == 0
    code, text, report = check(tmp_path, "--images")
    assert code == 1
    splits = report["found"][0]["splits"]
    assert {split: splits[split]["resized"] for split in sizes} == {
        "train": [],
        "val": [],
        "test": [str(tmp_path / "a.png")],
    }
    says = f"missing: test: 1 of 2 images are of another size than annotated: {tmp_path / 'a.png'}"
    assert [line.strip() for line in text.splitlines() if "another size" in line] == [says]


def test_damaged_images_are_found_by_decoding(tmp_path: Path, check: Any) -> None:
    Image.effect_noise((64, 48), 50).save(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-500])
    for split in ("train", "val"):
        rows = [{"image": image, "sentence": "x", "bbox": [1, 1, 5, 5]} for image in ("a.jpg", "b.jpg")]
        write_lines(tmp_path / f"{split}.jsonl", rows)
    assert check(tmp_path)[0] == 0
    code, text, _ = check(tmp_path, "--images")
    assert code == 1
    for split in ("train", "val"):
        assert f"missing: {split}: 1 of 2 images are unreadable: {tmp_path / 'b.jpg'}" in text
