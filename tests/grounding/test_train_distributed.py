"""Two processes on the CPU train what one trains, and a lost process ends the run with a message."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers_command import Command, history

from attbalance_ext.grounding.files import load_checkpoint
from attbalance_ext.grounding.train import LAST

OPTIONS = ["--batch-size", "8", "--pretrain-steps", "0", "--rho", "global"]


def assert_same_records(run: Path, other: Path) -> None:
    for kind, records in history(run).items():
        others = history(other)[kind]
        assert len(records) == len(others)
        for record, expected in zip(records, others, strict=True):
            assert record.keys() == expected.keys()
            for name, value in record.items():
                assert value == pytest.approx(expected[name], rel=1e-6, abs=1e-6), (name, record["step"])


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, cache: Path) -> None:
    """Losses, rho, gradient norm of every step, and validation; then one of the runs goes on with the other number."""
    command = Command(tmp_path, cache)
    options = [*OPTIONS, "--steps", "12", "--validate-every", "6", "--terms-fraction", "0.75"]
    one, two = tmp_path / "one", tmp_path / "two"
    command.run("train", "--out", one, *options)
    command.run("train", "--out", two, *options, processes=2)
    assert_same_records(two, one)
    weights = [load_checkpoint(run / LAST)["model"] for run in (one, two)]
    for name, value in weights[0].items():
        if value.is_floating_point():
            # AdamW divides by the gradient's size, so rounding shows more in the weights than in the losses.
            torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4)


def children(process: subprocess.Popen[str]) -> list[int]:
    """The trainers that a torchrun started, in the order of ranks."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(child) for child in listed.split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc to find the processes")
def test_a_lost_process_ends_the_run_and_another_number_goes_on(tmp_path: Path, cache: Path) -> None:
    command = Command(tmp_path, cache)
    run = tmp_path / "run"
    endless = [*OPTIONS, "--steps", "100000", "--validate-every", "20"]
    process = command.start("train", "--out", run, *endless, processes=2)
    deadline = time.monotonic() + 120
    while not (run / LAST).exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(children(process)[1], signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "another process of this run is gone" in said
    saved = load_checkpoint(run / LAST)["step"]
    assert saved >= 20

    process = command.start("train", "--resume", run)
    while load_checkpoint(run / LAST)["step"] == saved:
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped at step" in said


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_though_it_reaches_the_whole_group(tmp_path: Path, cache: Path) -> None:
    """torchrun signals process groups; the trainers need their workers to end the step."""
    command = Command(tmp_path, cache)
    run = tmp_path / "run"
    options = ["--steps", "100000", "--validate-every", "5", "--augment", "--workers", "2"]
    process = command.start("train", "--out", run, *OPTIONS, *options, processes=2)
    deadline = time.monotonic() + 120
    while not (run / LAST).exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    stopped = re.search(r"stopped at step (\d+)", said)
    assert stopped is not None, said
    assert load_checkpoint(run / LAST)["step"] == int(stopped[1])


def test_parts_must_be_even(tmp_path: Path, cache: Path) -> None:
    said = Command(tmp_path, cache).run(
        "train", "--out", tmp_path / "run", *OPTIONS, "--accumulate", "3", "--steps", "2", expect=2
    )
    assert "batch_size must be divisible by processes x accumulate, got 8 for 1 x 3" in said
