"""Data in files: the same content is the same data set in every format, and what is missing or wrong is named."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_files import COCO, REFER_COCO, write_image, write_lines, write_refer, write_split
from PIL import Image

from attbalance_ext.grounding.data import SPLITS, Annotation, export, generate, load_dataset, open_dataset
from attbalance_ext.grounding.errors import UserError

FORMATS = ("split-files", "refer", "jsonl")
NAMES = {
    "refcoco": ("unc", "refcoco"),
    "refcoco+-hard": ("unc+", "refcoco+"),
    "refcocog": ("gref_umd", "refcocog-umd"),
    "referit": ("referit", "refclef"),
}


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    for split in SPLITS:
        monkeypatch.setitem(generate.SCENES, split, 6)


def stripped(annotations: list[Annotation]) -> list[Annotation]:
    """Without the folder, which differs between formats."""
    return [replace(annotation, image=Path(annotation.image.name)) for annotation in annotations]


@pytest.mark.usefixtures("few_scenes")
@pytest.mark.parametrize("flavour", NAMES)
def test_exports_are_equal_in_every_format(flavour: str, tmp_path: Path) -> None:
    for format in FORMATS:
        export(f"builtin:{flavour}", tmp_path / format, format, cache=tmp_path / "cache", progress=False)
    tests = ("testA", "testB") if "coco+" in flavour or flavour == "refcoco" else ("test", "test_novel")
    published = dict(zip(SPLITS, ("train", "val", *tests), strict=True))
    for split in (*SPLITS, "trainval"):
        read = [
            open_dataset(name, published.get(split, split), root=tmp_path / format)
            for format in FORMATS[:2]
            for name in NAMES[flavour]
        ]
        read.append(open_dataset("jsonl", split, root=tmp_path / "jsonl"))
        first = read[0]
        assert len(first) > 0
        for other in read:
            assert stripped(other.annotations) == stripped(first.annotations)
            assert other.sentences == first.sentences
            assert other.wrong_boxes.total == 0
            assert all(np.array_equal(other.pixels(i), first.pixels(i)) for i in range(0, len(first), 5))
        if split == "trainval":
            continue
        original = load_dataset(f"builtin:{flavour}", split, cache=tmp_path / "cache", progress=False)
        expected = [(original.box(i), s, original.pixels(i).tobytes()) for i, s in enumerate(original.sentences)]
        found = [(first.box(i), s, first.pixels(i).tobytes()) for i, s in enumerate(first.sentences)]
        assert sorted(found) == sorted(expected)
        assert len({first.picture_key(i) for i in range(len(first))}) == len(
            {original.picture_key(i) for i in range(len(original))}
        )


def test_the_order_is_that_of_image_box_and_sentence(tmp_path: Path) -> None:
    for name in ("b.png", "a.png"):
        write_image(tmp_path / name)
    rows = [("b.png", "x", [1, 2, 3, 4]), ("a.png", "z", [9, 2, 3, 4]), ("a.png", "y", [9, 2, 3, 4])]
    rows += [("a.png", "w", [10, 2, 3, 4]), ("a.png", "x", [2, 2, 3, 4])]
    write_lines(tmp_path / "mine.train.jsonl", [{"image": i, "sentence": s, "bbox": b} for i, s, b in rows])
    assert open_dataset("mine", "train", root=tmp_path).sentences == ["x", "y", "z", "w", "x"]


@pytest.mark.parametrize("name", ["unc", "refcoco"])
def test_split_files_of_coco_hold_width_and_height(tmp_path: Path, name: str) -> None:
    write_image(tmp_path / COCO / "COCO_train2014_000000000009.jpg")
    attributes = [["r1", "none"]]
    row = ("COCO_train2014_000000000009.jpg", "9.pth", [1.5, 2, 10, 20.25], "man on left", attributes)
    write_split(tmp_path, "unc", "testA", [row])
    data = open_dataset(name, "testA", root=tmp_path)
    assert data.box(0) == (1.5, 2.0, 11.5, 22.25)
    assert data.sentences == ["man on left"]
    assert data.annotations[0].size == (64, 48)
    assert (data.pixels(0).mode, data.pixels(0).size) == ("RGB", (64, 48))


def test_referit_holds_corners(tmp_path: Path) -> None:
    write_image(tmp_path / "referit/images/38.jpg")
    write_split(tmp_path, "referit", "val", [("38.jpg", "38_1.pth", [1, 2, 30, 40], "sky", [])])
    assert open_dataset("refclef", "val", root=tmp_path).box(0) == (1, 2, 30, 40)


@pytest.mark.parametrize("archive", [True, False])
def test_flickr_holds_numpy_in_tuples_of_three(tmp_path: Path, archive: bool) -> None:
    write_image(tmp_path / "Flickr30k/flickr30k_images/36979.jpg")
    box = np.array([1, 2, 30, 40])
    rows = [("36979.jpg", box, "a man"), (np.str_("36979.jpg"), box.astype(np.float32) + 0.5, np.str_("a dog"))]
    path = write_split(tmp_path, "flickr", "train", rows)
    if archive:
        torch.save(rows, path)
    data = open_dataset("flickr", "train", root=tmp_path)
    assert list(zip(data.sentences, map(data.box, range(2)), strict=True)) == [
        ("a man", (1, 2, 30, 40)),
        ("a dog", (1.5, 2.5, 30.5, 40.5)),
    ]


@pytest.mark.parametrize("folder", ["", "data", "ln_data"])
@pytest.mark.parametrize("images", ["", "ln_data", "data"])
def test_published_layouts(tmp_path: Path, folder: str, images: str) -> None:
    write_image(tmp_path / images / COCO / "a.jpg")
    write_split(tmp_path / folder, "gref", "val", [("a.jpg", "m", [0, 0, 5, 5], "one", [])])
    assert open_dataset("refcocog-google", "val", root=tmp_path).pixels(0).size == (64, 48)


@pytest.mark.parametrize("images", [REFER_COCO, "images/train2014", COCO])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_refer_takes_the_images_name_and_the_processed_sentence(tmp_path: Path, images: str, protocol: int) -> None:
    write_image(tmp_path / images / "COCO_train2014_000000000009.jpg")
    entries = [
        ("train", "COCO_train2014_000000000009.jpg", [1.5, 2, 10, 20.25], ["a man", "the left man"]),
        ("val", "COCO_train2014_000000000009.jpg", [30, 2, 10, 20], ["a dog"]),
    ]
    write_refer(tmp_path, "refcocog", "umd", entries, protocol)
    data = open_dataset("refcocog-umd", "train", root=tmp_path)
    assert data.sentences == ["a man", "the left man"]
    assert data.annotations[0] == Annotation(
        tmp_path / images / "COCO_train2014_000000000009.jpg", "a man", (1.5, 2.0, 11.5, 22.25), (64, 48)
    )
    assert open_dataset("gref_umd", "trainval", root=tmp_path).sentences == ["a man", "the left man", "a dog"]


def test_google_and_umd_splits_lie_beside_each_other(tmp_path: Path) -> None:
    write_image(tmp_path / REFER_COCO / "a.jpg")
    write_refer(tmp_path, "refcocog", "google", [("train", "a.jpg", [1, 1, 5, 5], ["google's"])])
    write_refer(tmp_path, "refcocog", "umd", [("train", "a.jpg", [1, 1, 5, 5], ["umd's"])])
    assert open_dataset("refcocog-google", "train", root=tmp_path).sentences == ["google's"]
    assert open_dataset("refcocog-umd", "train", root=tmp_path).sentences == ["umd's"]
    with pytest.raises(UserError, match="'refcocog' is split in two ways: say 'refcocog-umd' or 'refcocog-google'"):
        open_dataset("refcocog", "train", root=tmp_path)


def test_trainval_is_its_file_or_train_and_val(tmp_path: Path) -> None:
    write_image(tmp_path / COCO / "a.jpg")
    for split in ("train", "val"):
        write_split(tmp_path, "unc", split, [("a.jpg", "m", [0, 0, 5, 5], split, [])])
    assert open_dataset("unc", "trainval", root=tmp_path).sentences == ["train", "val"]
    write_split(tmp_path, "unc", "trainval", [("a.jpg", "m", [0, 0, 5, 5], "its own", [])])
    assert open_dataset("unc", "trainval", root=tmp_path).sentences == ["its own"]


def test_json_lines_of_several_data_sets(tmp_path: Path) -> None:
    image = write_image(tmp_path / "elsewhere" / "a.jpg")
    for name, path in (
        ("train", "elsewhere/a.jpg"),
        ("mine.train", str(image)),
        ("unc.train", "elsewhere/../elsewhere/a.jpg"),
    ):
        write_lines(
            tmp_path / f"{name}.jsonl",
            [
                {"image": path, "sentence": name, "bbox": [0, 0, 5, 5], "extra": 1},
            ],
        )
    for name, sentence in (("mine", "mine.train"), ("refcoco", "unc.train"), ("jsonl", "train"), ("other", "train")):
        data = open_dataset(name, "train", root=tmp_path)
        assert data.sentences == [sentence]
        assert data.pixels(0).size == (64, 48)


def test_paths_with_spaces_and_other_scripts(tmp_path: Path) -> None:
    root = tmp_path / "mes données 数据"
    write_image(root / COCO / "été 图 1.jpg")
    write_split(root, "unc", "train", [("été 图 1.jpg", "m", [0, 0, 5, 5], "le café à gauche 左", [])])
    write_lines(
        root / "train.jsonl",
        [{"image": f"{COCO}/été 图 1.jpg", "sentence": "le café à gauche 左", "bbox": [0, 0, 5, 5]}],
    )
    assert stripped(open_dataset("unc", "train", root=root).annotations) == stripped(
        open_dataset("jsonl", "train", root=root).annotations
    )


def test_pixels_are_as_stored_whatever_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees
    Image.new("L", (64, 48), 7).save(tmp_path / "a.jpg", exif=exif)
    write_lines(tmp_path / "train.jsonl", [{"image": "a.jpg", "sentence": "x", "bbox": [0, 0, 64, 48]}])
    data = open_dataset("jsonl", "train", root=tmp_path)
    assert data.wrong_boxes.total == 0
    assert (data.pixels(0).size, data.pixels(0).mode) == ((64, 48), "RGB")


def line(**changes: Any) -> dict[str, Any]:
    return {"image": "a.jpg", "sentence": "x", "bbox": [0, 0, 5, 5], **changes}


def test_missing_images_are_named(tmp_path: Path) -> None:
    write_split(
        tmp_path, "unc", "train", [("a.jpg", "m", [0, 0, 5, 5], "x", []), ("b.jpg", "m", [0, 0, 5, 5], "x", [])]
    )
    first = tmp_path / COCO / "a.jpg"
    with pytest.raises(UserError) as raised:
        open_dataset("unc", "train", root=tmp_path)
    assert str(raised.value) == f"2 of 2 images are missing, the first is {first} (for 'x')"
    write_image(first)
    with pytest.raises(UserError, match=r"1 of 2 images are missing, the first is .*b\.jpg"):
        open_dataset("unc", "train", root=tmp_path)


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    Image.effect_noise((64, 48), 50).save(tmp_path / "a.jpg")
    write_lines(tmp_path / "train.jsonl", [line()])
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-500])
    data = open_dataset("jsonl", "train", root=tmp_path)
    with pytest.raises(UserError, match=r"a\.jpg cannot be read as an image: "):
        data.pixels(0)
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a\.jpg cannot be read as an image: "):
        open_dataset("jsonl", "train", root=tmp_path)


@pytest.mark.parametrize("size", [(640, 480), (48, 64)])
def test_an_image_of_another_size_is_named(tmp_path: Path, size: tuple[int, int]) -> None:
    write_image(tmp_path / "a.jpg", (64, 48))
    write_lines(tmp_path / "train.jsonl", [line(width=size[0], height=size[1])])
    with pytest.raises(UserError, match=rf"a\.jpg is \(64, 48\) pixels large; its annotations are for \({size[0]}, "):
        open_dataset("jsonl", "train", root=tmp_path).pixels(0)


def test_a_missing_split_names_every_path(tmp_path: Path) -> None:
    write_split(tmp_path, "unc", "train", [])
    with pytest.raises(UserError) as raised:
        open_dataset("refcoco", "testA", root=tmp_path)
    files = (tmp_path / "unc/unc_testA.pth", tmp_path / "refcoco/refs(unc).p", tmp_path / "testA.jsonl")
    assert str(raised.value) == (
        f"no split 'testA' of 'refcoco': expected {' or '.join(map(str, files))}; there is train (split files)"
    )


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no split 'train' of 'mine': expected .*/train\.jsonl; there is none"):
        open_dataset("mine", "train", root=tmp_path)
    with pytest.raises(UserError, match=r"root: there is no folder .*/none"):
        open_dataset("mine", "train", root=tmp_path / "none")
    write_lines(tmp_path / "train.jsonl", [])
    with pytest.raises(UserError, match=r"train\.jsonl holds no annotation of mine train"):
        open_dataset("mine", "train", root=tmp_path)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ({"a": 1}, "holds a dict; a split file is a list of tuples"),
        ([("a.jpg", "m", [0, 0, 5, 5], "x", []), ("a.jpg", "x")], "entry 1 cannot be used: it is no tuple of 5"),
        (["text!"], "entry 0 cannot be used: it is no tuple"),
        ([("a.jpg", "m", [0, 0, 5], "x", [])], "entry 0 cannot be used: a box is four numbers, not list of 3: 0, 0, 5"),
        ([("a.jpg", "m", [0, 0, 5, "5"], "x", [])], "a box is four numbers"),
        ([("a.jpg", "m", [0, 0, 5, True], "x", [])], "a box is four numbers"),
        ([("a.jpg", "m", [0, 0, 5, 10**400], "x", [])], "too large|four numbers"),
        ([("a.jpg", "m", "0055", "x", [])], "a box is four numbers, not '0055'"),
        ([(7, "m", [0, 0, 5, 5], "x", [])], "an image file is text, not 7"),
        ([("a.jpg", "m", [0, 0, 5, 5], None, [])], "a phrase is text, not None"),
    ],
)
def test_split_files_of_another_shape(tmp_path: Path, rows: Any, reason: str) -> None:
    path = write_split(tmp_path, "unc", "val", [])
    torch.save(rows, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=rf"unc_val\.pth:? .*({reason})"):
        open_dataset("unc", "val", root=tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"image": "a.jpg"}', "line 2: it has no bbox, sentence"),
        ("[1, 2]", "line 2: a line is an object with image, sentence and bbox, not a list"),
        ("{", "line 2: Expecting"),
        ('{"image": 1, "sentence": "x", "bbox": [0, 0, 5, 5]}', "line 2: image is text, not 1"),
        ('{"image": "a.jpg", "sentence": "x", "bbox": [0, 0, 5]}', "line 2: a box is four numbers"),
        (json.dumps(line(width="9", height=2)), "line 2: an image's width and height are integers above 0, not '9'"),
        (json.dumps(line(width=9, height=0)), "line 2: an image's width and height are integers above 0, not 0"),
        (json.dumps(line(width=10**400, height=2)), "line 2: an image's width and height are below 2147483648, not 1"),
        (json.dumps(line(width=9, height=2**31)), "line 2: an image's width and height are below 2147483648, not 2147"),
        ("[" * 100_000, "line 2: "),
        ("\udcff", "line 2: .*utf-8"),
    ],
)
def test_lines_of_another_shape(tmp_path: Path, content: str, reason: str) -> None:
    text = f"{json.dumps(line())}\n{content}\n"
    (tmp_path / "train.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    write_image(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=rf"train\.jsonl, {reason}"):
        open_dataset("mine", "train", root=tmp_path)


def test_lines_of_other_systems(tmp_path: Path) -> None:
    write_image(tmp_path / "a.jpg")
    (tmp_path / "train.jsonl").write_bytes(
        b"\xef\xbb\xbf" + f"{json.dumps(line())}\r\n\r\n{json.dumps(line())}".encode()
    )
    assert len(open_dataset("mine", "train", root=tmp_path)) == 2


def change_references(path: Path, change: Any) -> None:
    references = pickle.loads(path.read_bytes())
    change(references)
    path.write_bytes(pickle.dumps(references))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda refs: refs[0].pop("ann_id"), "entry 0 cannot be used: it has no ann_id"),
        (
            lambda refs: refs[0].update(ann_id=99),
            r"entry 0 cannot be used: its image or its annotation is not in .*instances\.json",
        ),
        (lambda refs: refs[0].update(image_id=[1]), "entry 0 cannot be used: an id is a number, not a list"),
        (lambda refs: refs[0].update(split=3), "entry 0 cannot be used: a split is text, not 3"),
        (lambda refs: refs[0].update(sentences=[{}]), "entry 0 cannot be used: no 'sent'"),
        (lambda refs: refs[0].update(sentences="x"), "entry 0 cannot be used: its sentences are a list, not a str"),
        (
            lambda refs: (refs[0].update(sentences=refs[0]["sentences"] * 500), refs.extend(refs * 99)),
            "the same sentences are used again and again, 50000 in",
        ),
        (lambda refs: refs.insert(0, "text"), "entry 0 cannot be used: a reference is a dictionary, not a str"),
    ],
)
def test_references_of_another_shape(tmp_path: Path, change: Any, reason: str) -> None:
    path = write_refer(tmp_path, "refcoco", "unc", [("train", "a.jpg", [1, 1, 5, 5], ["x"])])
    change_references(path, change)
    with pytest.raises(UserError, match=rf"refs\(unc\)\.p: {reason}"):
        open_dataset("refcoco", "train", root=tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is no JSON"),
        ("[]", "has no 'images' and 'annotations'"),
        ('{"images": [{"id": 1}], "annotations": []}', "entry 0 cannot be used: no 'file_name'"),
        ('{"images": [], "annotations": [{"id": [1], "bbox": []}]}', "entry 0 cannot be used: an id is a number"),
        ('{"images": 5, "annotations": []}', "cannot be used"),
        (
            json.dumps({"images": [{"id": 1, "file_name": "a", "width": 9, "height": 10**400}], "annotations": []}),
            "entry 0 cannot be used: an image's width and height are below 2147483648, not 1",
        ),
    ],
)
def test_instances_of_another_shape(tmp_path: Path, content: str | None, reason: str) -> None:
    write_refer(tmp_path, "refcoco", "unc", [("train", "a.jpg", [1, 1, 5, 5], ["x"])])
    instances = tmp_path / "refcoco/instances.json"
    instances.unlink() if content is None else instances.write_text(content)
    with pytest.raises(UserError, match=rf"instances\.json:? .*{reason}"):
        open_dataset("refcoco", "train", root=tmp_path)


@pytest.mark.parametrize("format", ["split", "refer"])
def test_hostile_annotations_run_nothing(tmp_path: Path, format: str) -> None:
    proof = tmp_path / "proof"
    program = f"cposix\nmkdir\n(S{str(proof)!r}\ntR.".encode()
    if format == "split":
        path = write_split(tmp_path, "unc", "train", [])
    else:
        path = write_refer(tmp_path, "refcoco", "unc", [])
    path.write_bytes(program)
    with pytest.raises(UserError) as raised:
        open_dataset("unc", "train", root=tmp_path)
    assert str(raised.value) == f"{path} is refused, nothing in it was run: it asks for 'posix.mkdir'"
    assert not proof.exists()


@pytest.mark.parametrize("format", ["split", "refer"])
def test_truncated_annotations_are_named(tmp_path: Path, format: str) -> None:
    if format == "split":
        path = write_split(tmp_path, "unc", "train", [("a.jpg", "m", [0, 0, 5, 5], "x", [])])
    else:
        path = write_refer(tmp_path, "refcoco", "unc", [("train", "a.jpg", [1, 1, 5, 5], ["x"])])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError) as raised:
        open_dataset("unc", "train", root=tmp_path)
    assert str(raised.value).startswith(f"{path} is damaged or of another kind")
