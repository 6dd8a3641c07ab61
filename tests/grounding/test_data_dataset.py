"""Loading splits: shapes, promises of the splits, errors, the vocabulary, the card."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from attbalance_ext.grounding.data import (
    FRESH_SPLITS,
    SPLITS,
    VALUES,
    GroundingDataset,
    Vocabulary,
    card,
    export,
    generate,
    load_dataset,
)
from attbalance_ext.grounding.data.attributes import is_held_out
from attbalance_ext.grounding.data.dataset import load_arrays
from attbalance_ext.grounding.data.names import BuiltinName
from attbalance_ext.grounding.errors import UserError


@pytest.fixture(autouse=True)
def _few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    for split in SPLITS + FRESH_SPLITS:
        monkeypatch.setitem(generate.SCENES, split, 30)


def load(name: str, split: str, cache: Path, size: int = 64) -> GroundingDataset:
    return load_dataset(name, split, cache=cache, size=size, progress=False)


def test_shapes_and_types(tmp_path: Path) -> None:
    data = load("builtin:refcoco", "train", tmp_path)
    n = len(data)
    assert n > 60
    assert data.images.shape == (30, 3, 64, 64)
    assert data.images.dtype == torch.uint8
    assert data.boxes.shape == (n, 4)
    assert data.boxes.dtype == data.box_ratio.dtype == torch.float32
    assert data.scene_index.dtype == torch.int64
    assert data.scene_index.shape == (n,)
    assert set(data.scene_index.tolist()) <= set(range(30))
    assert len(data.sentences) == n
    assert torch.equal(data.box_ratio, data.boxes[:, 2] * data.boxes[:, 3])
    corners = torch.cat([data.boxes[:, :2] - data.boxes[:, 2:] / 2, data.boxes[:, :2] + data.boxes[:, 2:] / 2], 1)
    assert (corners >= 0).all()
    assert (corners <= 1).all()


def test_samples_and_batches_agree(tmp_path: Path) -> None:
    data = load("builtin:referit", "val", tmp_path)
    images, sentences, boxes, ratio = data.batch(torch.tensor([7, 0, 7]))
    for row, index in enumerate([7, 0, 7]):
        sample = data[index]
        assert torch.equal(images[row], sample.image)
        assert torch.equal(sample.image, data.images[data.scene_index[index]])
        assert sentences[row] == sample.sentence == data.sentences[index]
        assert torch.equal(boxes[row], sample.box)
        assert ratio[row] == sample.box_ratio
    assert data.batch([])[0].shape == (0, 3, 64, 64)


def test_objects_hold_every_target_and_only_training_has_them(tmp_path: Path) -> None:
    data = load("builtin:refcocog-hard", "train", tmp_path)
    objects = data.objects
    assert objects.boxes.shape == (30, 9, 4)
    for kind in VALUES:
        labels = getattr(objects, kind)
        assert ((labels >= 0) == objects.present).all()
        assert labels.max() < len(VALUES[kind])
    assert (objects.boxes[~objects.present] == 0).all()
    of_scene = objects.boxes[data.scene_index]
    assert (of_scene == data.boxes[:, None]).all(-1).any(-1).all()
    for split in ("val", "test", "test_novel", "fresh"):
        with pytest.raises(ValueError, match="only the split 'train'"):
            _ = load("builtin:refcocog-hard", split, tmp_path).objects


def test_sizes_share_scenes_and_sentences(tmp_path: Path) -> None:
    small, large = (load("builtin:refcoco+", "test", tmp_path, size) for size in (64, 128))
    assert large.images.shape[-2:] == (128, 128)
    assert small.sentences == large.sentences
    assert torch.equal(small.boxes, large.boxes)


@pytest.mark.parametrize("name", ["builtin:refcoco", "builtin:refcoco+-hard"])
def test_splits_share_no_scene_and_novel_is_novel(name: str, tmp_path: Path) -> None:
    seen: set[bytes] = set()
    for split in SPLITS + FRESH_SPLITS:
        arrays = load_arrays(BuiltinName.parse(name), split, cache=tmp_path, progress=False)
        scenes = {boxes.tobytes() for boxes in arrays["object_boxes"]}
        assert len(scenes) == 30
        assert not scenes & seen
        seen |= scenes
        labels = arrays["object_labels"]
        held_out = np.array([[row[0] >= 0 and is_held_out(_combination(row)) for row in scene] for scene in labels])
        if split in ("test_novel", "fresh_novel"):
            assert held_out[arrays["scene_index"], arrays["target"]].all()
        else:
            assert not held_out.any()


def _combination(row: np.ndarray) -> tuple[str, ...]:
    return tuple(VALUES[kind][label] for kind, label in zip(VALUES, row, strict=True))


def test_seeds_differ_by_split() -> None:
    assert set(generate.SEEDS) == set(generate.SCENES) == {*SPLITS, *FRESH_SPLITS}
    assert len(set(generate.SEEDS.values())) == len(generate.SEEDS)


def test_fresh_splits_are_for_studies_alone(tmp_path: Path) -> None:
    """Cards and exports are of the four splits that they were always of: what is counted there has been looked at."""
    assert SPLITS == ("train", "val", "test", "test_novel")
    assert not set(SPLITS) & set(FRESH_SPLITS)
    found = card("builtin:referit", cache=tmp_path, progress=False)
    assert tuple(found["splits"]) == SPLITS
    root = tmp_path / "files"
    export("builtin:referit", root, "jsonl", cache=tmp_path, progress=False)
    assert not list(tmp_path.rglob("*fresh*"))
    assert sorted(path.stem for path in root.glob("*.jsonl")) == sorted(SPLITS)


def test_more_scenes_leave_the_first_ones_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = load("builtin:referit", "train", tmp_path)
    monkeypatch.setitem(generate.SCENES, "train", 40)
    many = load("builtin:referit", "train", tmp_path)
    assert torch.equal(many.images[:30], few.images)
    assert many.sentences[: len(few)] == few.sentences


@pytest.mark.parametrize(
    ("name", "split", "size", "message"),
    [
        ("builtin:coco", "train", 64, r"no data set 'builtin:coco'; there are builtin:refcoco, .*-hard"),
        ("refcoco", "train", 64, "no data set 'refcoco'"),
        ("builtin:refcoco-hard-hard", "train", 64, "no data set"),
        ("builtin:refcoco", "testA", 64, "no split 'testA'; there are train, val, test, test_novel"),
        ("builtin:refcoco", "train", 96, "64 or 128 pixels wide, not 96"),
    ],
)
def test_what_does_not_exist_is_named(name: str, split: str, size: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load(name, split, tmp_path, size)
    assert isinstance(raised.value, UserError)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_vocabulary_round_trip() -> None:
    vocabulary = Vocabulary.builtin()
    again = Vocabulary(json.loads(json.dumps(vocabulary.words)))
    sentences = ["the red circle", "one", "a zebra left of the plus sign"]
    ids, padding = again.encode(sentences)
    assert torch.equal(ids, vocabulary.encode(sentences)[0])
    assert ids.shape == (3, 7)
    assert ids.max() < len(vocabulary)
    assert (~padding).sum(1).tolist() == [3, 1, 7]
    assert again.decode(ids[0].tolist()) == "the red circle"
    assert again.decode(ids[2].tolist()) == "a <unk> left of the plus sign"


def test_encoding_cuts_and_pads_to_max_length() -> None:
    ids, padding = Vocabulary(["a", "b"]).encode(["b a b", "A.", ""], max_length=2)
    assert ids.tolist() == [[3, 2], [2, 0], [0, 0]]
    assert padding.tolist() == [[False, False], [False, True], [True, True]]
    assert Vocabulary(["a"]).encode([])[0].shape == (0, 1)
    with pytest.raises(ValueError, match="listed twice"):
        Vocabulary(["a", "a"])
    assert Vocabulary.build(["b a", "a, c"]).words == ["a", "b", "c"]


def test_card_counts_what_is_there(tmp_path: Path) -> None:
    found = card("builtin:refcoco", cache=tmp_path, progress=False)
    (file,) = tmp_path.glob("*.card.json")
    assert json.loads(file.read_text()) == found
    assert set(found["splits"]) == set(SPLITS)
    arrays = load_arrays(BuiltinName.parse("builtin:refcoco"), "val", cache=tmp_path)
    data = load("builtin:refcoco", "val", tmp_path)
    split = found["splits"]["val"]
    assert split["sentences"] == len(data)
    assert split["distinct_sentences"] == len(set(data.sentences))
    assert split["box_ratio"]["mean"] == pytest.approx(data.box_ratio.mean().item(), abs=1e-4)
    training = set(load("builtin:refcoco", "train", tmp_path).sentences)
    assert split["seen_in_train"] == pytest.approx(np.mean([s in training for s in data.sentences]), abs=1e-4)
    assert found["splits"]["train"]["seen_in_train"] == 1
    counts = (arrays["object_labels"][..., 0] >= 0).sum(1)[data.scene_index.numpy()]
    assert split["chance"]["any_object"] == pytest.approx(np.mean(1 / counts), abs=1e-4)
    location = split["clauses"]["location"]
    assert 0.6 < location["needed"] <= location["present"] < 1
    assert split["clauses"]["relation"] == {"present": 0, "needed": 0}
