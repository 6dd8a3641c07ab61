"""Part of the training pictures: larger parts hold smaller ones, sentences stay with their pictures, runs resume."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_files import write_image, write_lines
from helpers_toy import finish, toy_settings

from attbalance_ext.grounding.data import FileDataset, GroundingDataset, load_dataset, open_dataset
from attbalance_ext.grounding.data.generate import SCENES
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.files import load_checkpoint
from attbalance_ext.grounding.runs import resume_run, start_run
from attbalance_ext.grounding.settings import Settings
from attbalance_ext.grounding.sources import open_pictures
from attbalance_ext.grounding.train import LAST

SHARES = (0.05, 0.1, 0.4, 0.5, 0.9, 1.0)


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCENES, "train", 40)
    monkeypatch.setitem(SCENES, "val", 10)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two hundred pictures with one to three sentences each, a third of them in a folder of its own."""
    root = tmp_path / "files"
    picture = write_image(root / "picture.png")
    records = []
    for number in range(200):
        name = f"{'deep/' if number % 3 == 0 else ''}{number}.png"
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / name).hardlink_to(picture)
        for sentence in range(1 + number % 3):
            box = [number % 10, sentence, 20, 20]
            records.append({"image": f"images/{name}", "bbox": box, "sentence": f"{number} {sentence}"})
    write_lines(root / "train.jsonl", records)
    write_lines(root / "val.jsonl", records[:6])
    return root


@pytest.fixture(params=["built-in", "files"])
def whole(request: pytest.FixtureRequest, cache: Path) -> GroundingDataset | FileDataset:
    if request.param == "files":
        return open_dataset("own", "train", root=request.getfixturevalue("files"))
    return load_dataset("builtin:refcoco", "train", cache=cache, progress=False)


def content(data: GroundingDataset | FileDataset) -> Iterator[tuple[object, str, tuple[float, ...], bytes]]:
    for index, sentence in enumerate(data.sentences):
        yield data.picture_key(index), sentence, data.box(index), data.pixels(index).tobytes()


def test_larger_parts_hold_smaller_ones(whole: GroundingDataset | FileDataset) -> None:
    everything = list(content(whole))
    smaller: set[object] = set()
    for share in SHARES:
        part = whole.part(share)
        found = list(content(part))
        assert len(part) == len(part.sentences) == len(found)
        # All sentences of the pictures that are in it, in the same order, with their boxes and pixels.
        kept = {key for key, *_ in found}
        assert found == [one for one in everything if one[0] in kept]
        assert smaller <= kept
        smaller = kept
        pictures = len({key for key, *_ in everything})
        assert abs(len(kept) - share * pictures) <= 4 * (pictures * share * (1 - share)) ** 0.5
    assert smaller == {key for key, *_ in everything}


def test_what_is_known_of_built_in_scenes_is_of_the_part(cache: Path) -> None:
    whole = load_dataset("builtin:refcoco", "train", cache=cache, progress=False)
    part = whole.part(0.25)
    assert len(whole.images) == 40  # the whole is left as it was
    assert len(part.images) == 10
    assert set(part.scene_index.tolist()) == set(range(10))
    for index in range(len(part)):
        assert part[index].sentence == whole[index].sentence
        assert torch.equal(part[index].box_ratio, whole[index].box_ratio)
    for name, values in part.objects._asdict().items():
        assert torch.equal(values, getattr(whole.objects, name)[:10]), name
    assert len(whole.part(1e-9).images) == 1


def test_files_are_chosen_by_name_alone(files: Path) -> None:
    """Not by what else is there, so that a data set may grow."""
    whole = open_dataset("own", "train", root=files)
    some = FileDataset("own", "train", [a for a in whole.annotations if "7" in a.image.name])
    part = {a.image for a in whole.part(0.5).annotations}
    assert {a.image for a in some.part(0.5).annotations} == {a.image for a in some.annotations} & part


def test_a_name_that_is_no_text_is_in_a_part_too(tmp_path: Path) -> None:
    """Linux takes any bytes for a name."""
    names = [f"\udcff{number}.png" for number in range(20)]
    for name in names:
        write_image(tmp_path / name)
    records = [{"image": name, "sentence": "x", "bbox": [1, 1, 5, 5]} for name in names]
    write_lines(tmp_path / "own.train.jsonl", records)
    part = open_dataset("own", "train", root=tmp_path).part(0.5)
    assert 0 < len({a.image for a in part.annotations}) < 20


def test_which_pictures_are_in_a_part_stays(files: Path) -> None:
    part = open_dataset("own", "train", root=files).part(0.02)
    assert {a.image.name for a in part.annotations} == {"47.png", "52.png", "99.png", "123.png", "136.png"}


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_a_part_is_more_than_nothing_and_at_most_everything(share: float) -> None:
    with pytest.raises(UserError, match=rf"train_share must lie in \(0, 1\], got {share}"):
        Settings(train_share=share)


def test_a_part_without_a_picture_is_refused(files: Path) -> None:
    settings = Settings(data="own", data_root=str(files), train_share=1e-9)
    with pytest.raises(UserError, match="own train has no sentences"):
        open_pictures(settings, "train")


@pytest.mark.parametrize("own", [False, True], ids=["built-in", "files"])
def test_a_run_trains_on_its_part_and_resumes_on_it(
    own: bool, tmp_path: Path, cache: Path, request: pytest.FixtureRequest
) -> None:
    settings = toy_settings(
        size=64,
        train_share=0.5,
        steps=6,
        validate_every=3,
        **({"data": "own", "data_root": str(request.getfixturevalue("files"))} if own else {}),
    )
    whole = start_run(settings, tmp_path / "whole", cache=cache)
    everything = open_pictures(replace(settings, train_share=1.0), "train", cache=cache)
    assert 0.3 * len(everything) < len(whole.split) < 0.7 * len(everything)
    assert whole.order.samples == len(whole.split)
    validation = open_pictures(replace(settings, train_share=1.0), "val", cache=cache)  # never cut
    assert len(whole.validation) == len(validation)
    known = " ".join(everything.part(0.5).sentences).lower().split()
    assert set(whole.split.tokenizer.state()["words"]) == set(known)

    first = start_run(settings, tmp_path / "resumed", cache=cache)
    for _ in range(2):
        first.advance()
    first.save()
    first.log.close()
    second = resume_run(tmp_path / "resumed", cache=cache)
    assert len(second.split) == len(whole.split)
    for trainer in (whole, second):
        finish(trainer)
    ends = [load_checkpoint(tmp_path / name / LAST)["model"] for name in ("whole", "resumed")]
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
