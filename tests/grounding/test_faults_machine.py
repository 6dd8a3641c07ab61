"""Memory, open files and processes that run out: one line says what is missing and where the last good state lies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_command import Command, assert_same_end, call
from helpers_faults import OPTIONS, write_own_data
from torch import Tensor
from torch.utils.data import get_worker_info

from attbalance_ext.grounding.data.transforms import EvalTransform
from attbalance_ext.grounding.train import LAST, Trainer

OWN = ["--data", "own", "--steps", "4", "--batch-size", "4", "--pretrain-steps", "0", "--checkpoint-every", "1"]


def no_memory_on_a_gpu() -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB\nand more lines")


def no_memory_in_python() -> Tensor:
    raise MemoryError


OUT_OF_MEMORY: dict[str, tuple[Callable[[], Tensor], str]] = {
    "CPU": (lambda: torch.empty(2**46), "memory ran out ([enforce fail at "),
    "GPU": (no_memory_on_a_gpu, "memory ran out (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB). "),
    "Python": (no_memory_in_python, "memory ran out (MemoryError). "),
}


@pytest.mark.usefixtures("few_scenes")
@pytest.mark.parametrize("where", OUT_OF_MEMORY)
def test_memory_runs_out_in_a_step(
    where: str, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, step = tmp_path / "run", Trainer._train_step
    allocate, says = OUT_OF_MEMORY[where]

    def too_large(self: Trainer) -> None:
        if self.step == 6:
            allocate()
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", too_large)
        assert call("train", "--out", run, *OPTIONS) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"attbalance: {says}")
    assert "--accumulate" in said
    assert "--batch-size" in said
    assert f"The last good state: {run / LAST} of step 4; go on with: attbalance train --resume {run}" in said
    assert call("train", "--resume", run) == 0
    assert_same_end(run, whole_run)


@pytest.mark.usefixtures("few_scenes")
def test_another_error_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Trainer) -> None:
        raise RuntimeError("a mistake in the program")

    monkeypatch.setattr(Trainer, "_train_step", wrong)
    with pytest.raises(RuntimeError, match="a mistake in the program"):
        call("train", "--out", tmp_path / "run", *OPTIONS)


@pytest.mark.parametrize("kind", [RuntimeError, KeyError, MemoryError, OSError])
def test_an_error_in_a_process_that_reads_images(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has not died: it says what it met."""
    root = write_own_data(tmp_path / "data", [f"{number:02}.jpg" for number in range(20)])
    transform = EvalTransform.__call__

    def fail(self: EvalTransform, *arguments: object) -> object:
        if get_worker_info() is not None:
            raise kind("something new")
        return transform(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(EvalTransform, "__call__", fail)
    assert call("train", "--data-root", root, "--out", tmp_path / "run", *OWN, "--workers", "1") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"attbalance: a process that reads images has failed: {kind.__name__}: ")
    assert "something new" in said
    assert "has died" not in said
    assert "Nothing was saved yet" in said


def test_too_many_open_files(tmp_path: Path, cache: Path) -> None:
    root = write_own_data(tmp_path / "data", [f"{number:02}.jpg" for number in range(20)])
    prelude = """
import resource, warnings
from attbalance_ext.grounding import commands
warnings.simplefilter("ignore")
resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
"""
    command = Command(tmp_path, cache, prelude=prelude)
    said = command.run("train", "--data-root", root, "--out", tmp_path / "run", *OWN, "--workers", "8", expect=1)
    last = said.splitlines()[-1]
    assert last.startswith("attbalance: too many open files (")
    assert "fewer --workers need fewer" in last
    assert "Traceback" not in said
    assert "Exception ignored" not in said
