"""SIGKILL at any moment: no checkpoint is ever broken, and the run that goes on ends with the same bits."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from helpers_command import Command, assert_same_end

from attbalance_ext.grounding.files import load_checkpoint
from attbalance_ext.grounding.train import BEST, LAST

KILLS = 20
OPTIONS = ["--steps", "200", "--batch-size", "8", "--validate-every", "25", "--checkpoint-every", "1"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_kills_change_nothing(tmp_path: Path, cache: Path) -> None:
    command = Command(tmp_path, cache)
    options = [*OPTIONS, "--pretrain-steps", "0", "--rho", "ema"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command.run("train", "--out", whole, *options)

    moments = random.Random(0)
    reached = []
    while len(reached) < KILLS:
        resume = (killed / LAST).exists()
        before = (killed / LAST).stat().st_ino if resume else None
        process = command.start("train", *(["--resume", killed] if resume else ["--out", killed, *options]))
        while not (killed / LAST).exists() or (killed / LAST).stat().st_ino == before:
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.1))  # about three steps, each with a checkpoint
        assert process.poll() is None, "the run must be long enough to be killed so often"
        process.kill()
        process.communicate()
        for name in (LAST, BEST):
            if (killed / name).exists():
                load_checkpoint(killed / name)
        reached.append(load_checkpoint(killed / LAST)["step"])
    assert reached == sorted(reached)
    assert reached[-1] < 200
    command.run("train", "--resume", killed)

    assert_same_end(killed, whole)
