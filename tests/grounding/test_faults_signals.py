"""SIGTERM and Ctrl-C: the step ends, the run is saved, and goes on with the bits of one that was never stopped."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from helpers_command import Command, assert_same_end, call
from helpers_faults import OPTIONS

from attbalance_ext.grounding.files import load_checkpoint
from attbalance_ext.grounding.train import LAST

pytestmark = pytest.mark.usefixtures("few_scenes")

# A shell's background job, as these tests may be one, is started with Ctrl-C ignored.
IN_STEP_6 = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from attbalance_ext.grounding.train import Trainer
step = Trainer._train_step
def signalled(self):
    if self.step == 5:
        {signals}
    step(self)
Trainer._train_step = signalled
"""
# To this thread, which handles it at once: Python would handle two that are both waiting in the order of their numbers.
SEND = "signal.raise_signal(signal.{}); "


@pytest.mark.parametrize(("signals", "code"), [(["SIGINT"], 130), (["SIGTERM", "SIGTERM"], 143)])
def test_a_signal_lets_the_step_end_and_saves(
    signals: list[str], code: int, whole_run: Path, tmp_path: Path, cache: Path
) -> None:
    """A scheduler and torchrun each send a SIGTERM."""
    run = tmp_path / "my rün"
    prelude = IN_STEP_6.format(signals="".join(map(SEND.format, signals)))
    said = Command(tmp_path, cache, prelude=prelude).run("train", "--out", run, *OPTIONS, expect=code)
    assert f"stopped at step 6; checkpoint: {run / LAST}; continue with: attbalance train --resume '{run}'" in said
    assert load_checkpoint(run / LAST)["step"] == 6
    assert not list(run.glob(".*.tmp"))
    _, *arguments = shlex.split(said.partition("continue with: ")[2])
    assert call(*arguments) == 0
    assert_same_end(run, whole_run)


def test_ctrl_c_after_a_signal_stops_at_once(whole_run: Path, tmp_path: Path, cache: Path) -> None:
    run = tmp_path / "run"
    prelude = IN_STEP_6.format(signals=SEND.format("SIGTERM") + SEND.format("SIGINT"))
    said = Command(tmp_path, cache, prelude=prelude).run("train", "--out", run, *OPTIONS, expect=130)
    assert "stopped at step" not in said
    assert "Traceback" not in said
    assert load_checkpoint(run / LAST)["step"] == 4, "the checkpoint before"
    assert not list(run.glob(".*.tmp"))
    assert call("train", "--resume", run) == 0
    assert_same_end(run, whole_run)
