"""Two processes and one folder: the second one is told so, and touches nothing."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
from helpers_command import Command, assert_same_end, call
from helpers_faults import OPTIONS, contents

from attbalance_ext.grounding.alone import alone_in
from attbalance_ext.grounding.distributed import Ranks
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.files import exclusive
from attbalance_ext.grounding.runs import take_folder
from attbalance_ext.grounding.train import LAST

pytestmark = pytest.mark.usefixtures("few_scenes")

WAIT_IN_STEPS_1_AND_6 = """
import pathlib, time
from attbalance_ext.grounding.train import Trainer
step = Trainer._train_step
def waiting(self):
    while self.step in (0, 5) and not pathlib.Path({folder!r}, f"go on from {{self.step}}").exists():
        time.sleep(0.01)
    step(self)
Trainer._train_step = waiting
"""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def test_a_second_process_is_refused_and_the_first_goes_on(
    whole_run: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    refused = f"attbalance: another process is training in {run}; wait for its end, or take another folder\n"
    first = Command(tmp_path, cache, prelude=WAIT_IN_STEPS_1_AND_6.format(folder=str(tmp_path))).start(
        "train", "--out", run, *OPTIONS
    )
    try:
        wait_for(run / "settings.json")
        before = contents(run)
        assert call("train", "--out", run, *OPTIONS, "--seed", "2") == 2
        assert capsys.readouterr().err == refused
        assert contents(run) == before

        (tmp_path / "go on from 0").touch()
        wait_for(run / LAST)
        being_written = run / ".last.pt.1-0a.tmp"  # as it is while a checkpoint is written
        being_written.touch()
        for path in (run, run / LAST):
            assert call("train", "--resume", path) == 2
            assert capsys.readouterr().err == refused
        assert being_written.exists()
        (tmp_path / "go on from 5").touch()
        _, said = first.communicate(timeout=120)
    finally:
        first.kill()
    assert first.returncode == 0, said
    assert_same_end(run, whole_run)
    assert call("train", "--resume", run) == 0, "the folder is free again"


def test_a_folder_is_free_when_training_has_ended_or_failed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call("train", "--out", run, *OPTIONS, "--steps", "2") == 0
    for arguments, code in ((["--resume", run], 0), (["--out", run], 2)):
        assert call("train", *arguments) == code
        with exclusive(run / "run", wait=False) as alone:
            assert alone


def test_a_name_without_a_run_gets_no_lock(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        assert call("train", "--resume", path) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_process_may_enter_again_what_it_holds(tmp_path: Path) -> None:
    with alone_in(tmp_path / "run") as outer:
        with alone_in(tmp_path / "." / "run") as inner:
            assert outer
            assert inner
        with exclusive(tmp_path / "run" / "run", wait=False) as alone:
            assert not alone, "the outer block has not ended"
    with exclusive(tmp_path / "run" / "run", wait=False) as alone:
        assert alone
        with alone_in(tmp_path / "run") as found:
            assert not found


def test_processes_that_read_images_do_not_keep_the_folder(tmp_path: Path) -> None:
    """Of a trainer that was killed they notice only seconds later."""
    ours, theirs = multiprocessing.Pipe()

    def read() -> None:
        theirs.send("started")
        theirs.recv()

    with alone_in(tmp_path / "run"):
        reader = multiprocessing.get_context("fork").Process(target=read)
        reader.start()
        assert ours.poll(60)
    try:
        with exclusive(tmp_path / "run" / "run", wait=False) as alone:
            assert reader.is_alive()
            assert alone
    finally:
        ours.send("end")
        reader.join()


def test_all_processes_of_a_run_are_told_what_its_main_one_met(tmp_path: Path) -> None:
    class Other(Ranks):
        def any(self, flag: bool) -> bool:
            assert not flag
            return True

    with pytest.raises(UserError, match="another process is training in "), take_folder(tmp_path, Other(1, 2)):
        raise AssertionError("it is not inside")
    assert list(tmp_path.iterdir()) == [], "the main process alone has a lock"


@pytest.mark.slow
def test_two_processes_of_one_run_are_refused_together(whole_run: Path, tmp_path: Path, cache: Path) -> None:
    run = Path(shutil.copytree(whole_run, tmp_path / "run"))
    command = Command(tmp_path, cache)
    with exclusive(run / "run"):
        said = command.run("train", "--resume", run, processes=2, expect=1)
    assert f"attbalance: another process is training in {run}; " in said
    assert "attbalance_ext/grounding" not in said, "no traceback of ours"
    command.run("train", "--resume", run, processes=2)


def test_a_demo_does_not_remove_the_runs_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert call("demo", "--out", out, "--steps", "2", "--pretrain-steps", "0") == 0
    before = contents(out / "plain")
    with exclusive(out / "plain" / "run"):
        assert call("demo", "--out", out, "--steps", "2", "--pretrain-steps", "0") == 2
    assert f"another process is training in {out / 'plain'}; " in capsys.readouterr().err
    assert contents(out / "plain") == before
