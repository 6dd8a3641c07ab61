"""The image encoder's pre-training: done once, read back after, and made again where the file is of no use."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest
import torch

from attbalance_ext.grounding import pretrain
from attbalance_ext.grounding.data import GroundingDataset, load_dataset
from attbalance_ext.grounding.data.generate import SCENES
from attbalance_ext.grounding.models.vision import ConvEncoder

CPU = torch.device("cpu")


@pytest.fixture
def scenes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> GroundingDataset:
    monkeypatch.setitem(SCENES, "train", 70)
    return load_dataset("builtin:refcoco", "train", cache=cache, progress=False)


def encoder() -> ConvEncoder:
    torch.manual_seed(0)
    return ConvEncoder(image_size=64, dim=32, heads=2, layers=1, hidden=32)


@pytest.mark.parametrize("damage", [None, b"", b"not a checkpoint", "old"])
def test_is_done_once_unless_the_file_is_of_no_use(
    damage: bytes | str | None, scenes: GroundingDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encoder()
    pretrain.load_pretrained(first, scenes, 2, CPU, tmp_path)
    (file,) = tmp_path.glob("*.pt")
    if damage == "old":
        torch.save({"format": 0, "encoder": {}}, file)
    elif isinstance(damage, bytes):
        file.write_bytes(damage)
    trained = []
    again = pretrain.pretrain
    monkeypatch.setattr(pretrain, "pretrain", lambda *arguments: (trained.append(1), again(*arguments)))
    second = encoder()
    pretrain.load_pretrained(second, scenes, 2, CPU, tmp_path)
    assert len(trained) == (damage is not None)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_of_two_processes_one_trains_and_the_other_reads(
    scenes: GroundingDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"

    def train(encoder: ConvEncoder, *_: object) -> None:
        with open(calls, "a") as file:
            file.write("!")
        time.sleep(0.3)
        torch.nn.init.constant_(encoder.norm.weight, 7.0)

    monkeypatch.setattr(pretrain, "pretrain", train)

    def load() -> None:
        mine = encoder()
        barrier.wait()
        pretrain.load_pretrained(mine, scenes, 2, CPU, tmp_path)
        assert (mine.norm.weight == 7.0).all()

    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=load) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert calls.read_text() == "!"


def test_a_whole_file_needs_no_lock(scenes: GroundingDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock is a file, and a cache may be read-only."""
    first, second = encoder(), encoder()
    pretrain.load_pretrained(first, scenes, 2, CPU, tmp_path)

    def refuse(path: Path) -> None:
        raise PermissionError(f"{path} is read-only")

    monkeypatch.setattr(pretrain, "exclusive", refuse)
    pretrain.load_pretrained(second, scenes, 2, CPU, tmp_path)
    assert torch.equal(second.norm.weight, first.norm.weight)
