"""Images that are missing or cannot be read, met in the middle of an epoch too; sets without a sentence."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_command import assert_same_end, call
from helpers_faults import contents, without_override, write_own_data
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch.utils.data import get_worker_info

from attbalance_ext.grounding.data.files import FileDataset
from attbalance_ext.grounding.files import load_checkpoint
from attbalance_ext.grounding.order import DataOrder
from attbalance_ext.grounding.train import LAST

OPTIONS = ["--steps", "4", "--batch-size", "4", "--validate-every", "4", "--pretrain-steps", "0", "--augment"]
NAMES = [f"a bäll 球 {number:02}.jpg" for number in range(20)]
BAD = int(DataOrder(16, 4, 0).indices(2)[1])
"""A sample of the third step."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_own_data(tmp_path / "my dätä 数据", NAMES)


def train(root: Path, out: Path, *more: str) -> int:
    return call("train", "--data", "own", "--data-root", root, "--out", out, *OPTIONS, *more)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_corrupt_jpeg_in_the_middle_of_an_epoch(
    workers: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(root, whole, "--workers", workers) == 0
    image = root / NAMES[BAD]
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    assert train(root, run, "--workers", workers) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"attbalance: {image} cannot be read as an image: image file is truncated")
    assert f"(for 'the ball {BAD}'; 'attbalance data check ROOT --images' finds all such files)" in said
    assert f"Stopped before step 3. The last good state: {run / LAST} of step 2; go on with: " in said
    assert load_checkpoint(run / LAST)["step"] == 2, "saved though no checkpoint was due"

    assert call("data", "check", root, "--images") == 1
    assert f"missing: train: 1 of 16 images are unreadable: {image}" in capsys.readouterr().out
    image.write_bytes(content)
    assert call("train", "--resume", run) == 0
    assert_same_end(run, whole)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_decoder_that_raises_what_it_likes_in_the_middle_of_an_epoch(
    workers: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Pillow's for AVIF does on damaged files: to the loader of batches it is an image like any other."""
    load = JpegImageFile.load

    def broken(self: JpegImageFile) -> Any:
        if Path(os.fsdecode(self.filename)).name == NAMES[BAD]:
            raise RuntimeError("Conversion from YUV failed")
        return load(self)

    monkeypatch.setattr(JpegImageFile, "load", broken)
    run = tmp_path / "run"
    assert train(root, run, "--workers", workers) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    says = (
        f"attbalance: {root / NAMES[BAD]} cannot be read as an image: Conversion from YUV failed (for 'the ball {BAD}'"
    )
    assert said.startswith(says)
    assert load_checkpoint(run / LAST)["step"] == 2
    assert call("data", "check", root, "--images") == 1
    assert f"train: 1 of 16 images are unreadable: {root / NAMES[BAD]}" in capsys.readouterr().out


def grow(path: Path) -> None:
    with Image.open(path) as image:
        image.resize((2000, 1000)).save(path, "JPEG")


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "deleted": (Path.unlink, "1 of 16 images are missing, the first is {}"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "1 of 16 images are missing, the first is {}"),
    "a link to itself": (lambda path: (path.unlink(), path.symlink_to(path)), "images are missing, the first is {}"),
    "empty": (lambda path: path.write_bytes(b""), "{} cannot be read as an image: cannot identify image file"),
    "text": (lambda path: path.write_text("no image"), "{} cannot be read as an image: cannot identify image file"),
    "not permitted": (lambda path: path.chmod(0), "{} cannot be read as an image: [Errno 13] Permission denied"),
    "of another size": (lambda path: Image.new("RGB", (9, 9)).save(path), "{} is (9, 9) pixels large; its annotations"),
    "a decompression bomb": (grow, "{} cannot be read as an image: Image size (2000000 pixels) exceeds limit"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_unreadable_image_is_named_with_its_sentence(
    kind: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, says = UNREADABLE[kind]
    first = int(DataOrder(16, 4, 0).indices(0)[0])
    image = root / NAMES[first]
    spoil(image)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with without_override():
        assert train(root, tmp_path / "run") == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert call("data", "check", root, "--images") == 1
    assert said.startswith("attbalance: ")
    assert says.format(image) in said
    assert f"(for 'the ball {first}'" in said
    assert str(image) in capsys.readouterr().out


def test_a_folder_of_images_that_may_not_be_entered(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "images").mkdir()
    record = {"image": f"images/{NAMES[0]}", "sentence": "x", "bbox": [1, 1, 5, 5]}
    (root / "train.jsonl").write_text(json.dumps(record))
    (root / "images").chmod(0)
    try:
        with without_override():
            assert train(root, tmp_path / "run") == 2
    finally:
        (root / "images").chmod(0o700)
    said = capsys.readouterr().err
    assert said == f"attbalance: {root / 'images' / NAMES[0]} cannot be read: Permission denied\n"


def test_a_process_that_reads_images_is_killed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by a kernel that is short of memory."""
    pixels = FileDataset.pixels

    def killed(self: FileDataset, index: int) -> Image.Image:
        if get_worker_info() is not None and self.split == "train" and index == BAD:
            os.kill(os.getpid(), signal.SIGKILL)
        return pixels(self, index)

    monkeypatch.setattr(FileDataset, "pixels", killed)
    run = tmp_path / "run"
    assert train(root, run, "--workers", "1", "--checkpoint-every", "1") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("attbalance: a process that reads images has died (DataLoader worker ")
    assert "fewer workers need less. " in said
    monkeypatch.undo()
    if (run / LAST).exists():  # the news may come before the first step has ended
        assert "go on with: attbalance train --resume" in said
        assert call("train", "--resume", run) == 0


# --- sets without a sentence ------------------------------------------------------------------------------------------


def test_sets_of_length_0(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training, validation, evaluation and report: each says which set, and that it is empty."""
    run = tmp_path / "run"
    assert train(root, run) == 0
    (root / "test.jsonl").write_text("\n\n")
    before = contents(run)
    for command in (["eval", run], ["rho", run], ["report", run, "--out", tmp_path / "page.html"]):
        capsys.readouterr()
        assert call(*command, "--split", "test") == 2
        assert capsys.readouterr().err == f"attbalance: {root / 'test.jsonl'} holds no annotation of own test\n"
    assert not (tmp_path / "page.html").exists()
    assert contents(run) == before
    for split in ("val", "train"):
        lines = (root / f"{split}.jsonl").read_text()
        (root / f"{split}.jsonl").write_text("")
        for command in (["train", "--resume", run], ["train", "--data", "own", "--data-root", root, "--out", "new"]):
            capsys.readouterr()
            assert call(*command) == 2
            assert capsys.readouterr().err == f"attbalance: {root / split}.jsonl holds no annotation of own {split}\n"
        (root / f"{split}.jsonl").write_text(lines)


def test_a_set_of_length_0_once_wrong_boxes_are_left_out(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "val.jsonl").write_text(json.dumps({"image": NAMES[0], "sentence": "x", "bbox": [1, 1, 0, 0]}))
    assert train(root, tmp_path / "run") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("attbalance: own val has no sentences: all of its boxes are wrong and left out ")


def test_a_share_of_length_0(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(root, tmp_path / "run", "--train-share", "1e-9") == 2
    said = capsys.readouterr().err
    assert said == "attbalance: own train has no sentences in a share of 1e-09 of its pictures (train_share)\n"
