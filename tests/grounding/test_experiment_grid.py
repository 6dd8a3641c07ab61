"""Grids: every cell trained once, in a process of its own, whatever is killed on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_experiment import STUDY, TOP, Study, call, fill_cache, wait_until, without_times

from attbalance_ext.grounding.data.generate import content_version
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.evaluate import evaluate
from attbalance_ext.grounding.experiment import grid, worker
from attbalance_ext.grounding.experiment.cell import run_cell
from attbalance_ext.grounding.experiment.grid import Outcome, Places, default_jobs, run_grid
from attbalance_ext.grounding.experiment.record import load_record
from attbalance_ext.grounding.experiment.spec import Cell
from attbalance_ext.grounding.files import exclusive, load_checkpoint
from attbalance_ext.grounding.runs import load_run
from attbalance_ext.grounding.settings import Settings
from attbalance_ext.grounding.sources import open_split
from attbalance_ext.grounding.train import BEST, LAST, Trainer

# A library that prints where a worker answers, as it is imported.
NOISE = """
import sys
sys.stdout.write('Welcome!\\n3\\nnull\\n[1]\\n{"step": 1}\\n')
sys.stdout.buffer.write(b"\\xff\\n")
"""
MORE = """
[variants.same]
against = ["full"]
[variants.bad]
data_root = "no-such-folder"
train_share = 0.5
"""
NAME = "transvg-tiny refcoco {} seed 0"
STEPS = 95


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkey:
        for name in ("TRITON_INTERPRET", "ATTBALANCE_BACKEND"):
            monkey.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_cache(tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Study:
    """A study that was run, two cells at a time: one of its cells fails, and two are one and the same."""
    study = Study(tmp_path_factory.mktemp("done"), cache, STUDY + MORE)
    noise = study.folder / "noise"
    noise.mkdir()
    (noise / "sitecustomize.py").write_text(NOISE)
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setenv("PYTHONPATH", str(noise), prepend=os.pathsep)
        said = study.call("--jobs", "2")
    assert said.code == 1, said.err
    (study.folder / "said").write_text(said.err)
    return study


@pytest.fixture
def study(tmp_path: Path, cache: Path) -> Study:
    """The same study with nothing done."""
    return Study(tmp_path / "study", cache)


def six(value: Any) -> Any:
    """Six digits of every number."""
    if isinstance(value, list):
        return [six(item) for item in value]
    return float(f"{value:.6g}")


# --- what a grid leaves -----------------------------------------------------------------------------------------------


def test_every_cell_is_run_once_and_says_what_failed(done: Study) -> None:
    said = (done.folder / "said").read_text()
    assert "Small: 4 cells, 3 runs left to do" in said
    assert "2 runs finished" in said
    (failed,) = (line for line in said.splitlines() if line.startswith("failed:"))
    log = done.run("bad") / "log.txt"
    assert failed == f"failed: {NAME.format('bad')}: UserError: root: there is no folder no-such-folder ({log})"
    assert "no-such-folder" in log.read_text()
    assert done.places.record(done.cell("same")) == done.places.record(done.cell("full"))
    assert done.records() == {done.places.record(done.cell(variant)).name for variant in ("plain", "full")}
    assert len(list(done.places.runs.iterdir())) == 3


@pytest.mark.parametrize("variant", ["plain", "full"])
@pytest.mark.parametrize("split", ["fresh", "val"])
def test_results_are_those_of_the_last_checkpoint(variant: str, split: str, done: Study) -> None:
    last = done.run(variant) / LAST
    said = call("eval", last, "--split", split, "--json", "--cache", done.cache)
    metrics = json.loads(said.out)
    assert metrics["step"] == STEPS
    found = dict(done.record(variant).results[split])
    by_size = found.pop("by_size")
    assert found == {name: six(metrics[name]) for name in found}
    assert set(metrics) - set(found) == {"run", "step", "split"}

    run = load_run(last)
    data = open_split(run.settings, split, run.tokenizer, run.model, cache=done.cache)
    assert by_size == {name: six(value) for name, value in evaluate(run.model, data).accuracy_by_size().items()}


@pytest.mark.parametrize("variant", ["plain", "full"])
def test_a_record_repeats_the_history(variant: str, done: Study) -> None:
    record = done.record(variant)
    history = json.loads((done.run(variant) / "history.json").read_text())
    validation, windows = history["validation"], history["train"]
    assert [point["step"] for point in record.curve] == [20, 40, 60, 80, STEPS]
    for point, found in zip(record.curve, validation, strict=True):
        for name in ("acc50", "acc70", "miou", "in_box", "rho"):
            assert point[name] == six(found[name])

    with_terms = [window for window in windows if "attention" in window]
    without = [window for window in windows if "attention" not in window]
    if variant == "plain":
        assert with_terms == []
        assert record.training == {}
        assert record.plain_step_ms is None
        assert record.step_ms == six(statistics.median(window["step_ms"] for window in without))
    else:
        assert with_terms[-1]["step"] == 70  # of 63 steps with terms
        means = {n: statistics.fmean(window[n] for window in with_terms) for n in ("adw", "odw", "rac", "mrc")}
        means["dat"] = statistics.fmean(window["adw"] * window["odw"] for window in with_terms)
        rho = [statistics.fmean(layer) for layer in zip(*(window["rho"] for window in with_terms), strict=True)]
        assert record.training == {
            name: pytest.approx(value, rel=1e-5) for name, value in {**means, "rho": rho}.items()
        }
        assert record.step_ms == six(statistics.median(window["step_ms"] for window in with_terms))
        assert record.plain_step_ms == six(statistics.median(window["step_ms"] for window in without))


@pytest.mark.parametrize("variant", ["plain", "full"])
def test_times_are_of_all_steps(variant: str, done: Study) -> None:
    record = done.record(variant)
    windows = json.loads((done.run(variant) / "history.json").read_text())["train"]
    assert [window["step"] for window in windows] == [*range(10, STEPS, 10), STEPS]
    total = sum((5 if window["step"] == STEPS else 10) * window["step_ms"] for window in windows) / 1000
    assert record.seconds == pytest.approx(total, rel=1e-5)
    seconds = [point["seconds"] for point in record.curve]
    assert seconds == sorted(set(seconds))
    assert seconds[0] > 0
    assert seconds[-1] == record.seconds
    fastest, slowest = (f(window["step_ms"] for window in windows) / 1000 for f in (min, max))
    for point in record.curve:
        assert 0.999 * fastest * point["step"] <= point["seconds"] <= 1.001 * slowest * point["step"]


def test_a_record_knows_what_it_is_of(done: Study) -> None:
    for variant in ("plain", "full"):
        record = done.record(variant)
        assert Settings.from_dict(record.settings) == done.cell(variant).settings
        assert record.settings["terms_fraction"] == 2 / 3
        assert record.data_version == content_version()
        assert record.machine["torch"] == torch.__version__
        assert record.machine["cpu threads"] == "1"
        assert record.commit is None or len(record.commit) == 12


def test_a_finished_grid_does_nothing(done: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing was left to run")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    for variants in (["--variant", "plain", "--variant", "full"], ["--variant", "same"]):
        said = done.call(*variants)
        assert said.code == 0
        assert "0 runs left to do" in said.err
        assert "finished" not in said.err


def test_a_dry_run_says_where_everything_is(done: Study, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    more = Study(done.folder / "more", cache, STUDY.replace("seeds = [0]", "seeds = [0, 1]") + MORE)
    before = sorted(done.folder.rglob("*"))
    folders = ("--records", done.places.records, "--runs", done.places.runs, "--cache", cache)
    said = call("experiment", more.path, "--dry-run", *folders)
    assert said.code == 0
    assert "Small: 8 cells, 4 runs left to do" in said.err  # bad, and three of the other seed: same is full
    states = [[part.strip() for part in row.split("│")[1:-1]] for row in said.out.splitlines() if "builtin" in row]
    assert [row[2:5] for row in states] == [
        ["plain", "0", "done"],
        ["full", "0", "done"],
        ["same", "0", "done"],
        ["bad", "0", "begun"],
        *([variant, "1", "to do"] for variant in ("plain", "full", "same", "bad")),
    ]
    assert states[0][5] == str(done.places.record(done.cell("plain")))
    assert states[3][5] == str(done.run("bad"))
    assert sorted(done.folder.rglob("*")) == before


def test_a_part_of_a_study_can_be_run(done: Study) -> None:
    said = done.call("--dry-run", "--variant", "plain", "--variant", "bad", "--seed", "0", "--model", "transvg-tiny")
    assert "Small: 2 cells, 1 runs left to do" in said.err
    for option, value in (("--variant", "none"), ("--seed", "3"), ("--model", "vltvg-tiny"), ("--data", "refcoco")):
        said = done.call("--dry-run", option, value)
        assert said.code == 2
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert f"{done.path} has no {option[2:]} {value if option == '--seed' else repr(value)}; there is:" in said.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "tpu"], "unknown device 'tpu'; there is: cpu, cuda"),
        pytest.param(
            ["--device", "cuda"],
            "device 'cuda' is not available here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_a_device_that_is_not_there_is_said_once(arguments: list[str], says: str, study: Study) -> None:
    said = study.call(*arguments)
    assert said.code == 2
    assert says in said.err
    assert "failed" not in said.err
    assert not study.places.runs.exists()


# --- what is killed on the way ----------------------------------------------------------------------------------------


def test_a_stopped_grid_goes_on_and_ends_the_same(study: Study, done: Study) -> None:
    """Two cells at a time, then one: neither that nor the stop decides a bit."""
    runs = [study.run(variant) for variant in ("plain", "full")]
    with study.started("--jobs", "2") as process:
        wait_until(lambda: all((run / LAST).exists() for run in runs), process)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
    assert process.returncode == 143, said
    assert "stopped; the same command goes on from here" in said
    assert "failed" not in said
    assert not study.busy("plain")
    assert not study.busy("full")
    assert min(load_checkpoint(run / LAST)["step"] for run in runs) < STEPS
    assert len(study.records()) < 2

    said_now = study.call("--jobs", "1")
    assert said_now.code == 0, said_now.err
    for variant in ("plain", "full"):
        assert without_times(study.record(variant)) == without_times(done.record(variant))
        ends = [load_checkpoint(each.run(variant) / LAST)["model"] for each in (study, done)]
        assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_cell_that_is_stopped_before_its_first_step_has_not_failed(study: Study) -> None:
    with study.started("--variant", "plain") as process:
        wait_until((study.run("plain") / "log.txt").exists, process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130, said
    assert "stopped; the same command goes on from here" in said
    assert "failed" not in said
    assert not study.busy("plain")


def test_cells_whose_grid_was_killed_save_and_leave(tmp_path: Path, cache: Path) -> None:
    study = Study(tmp_path / "study", cache, STUDY.replace(f"steps = {STEPS}", "steps = 100000"))
    runs = [study.run(variant) for variant in ("plain", "full")]
    with study.started("--jobs", "2") as process:
        wait_until(lambda: all((run / LAST).exists() for run in runs), process)
        assert study.busy("plain")
        assert study.busy("full")
        process.kill()
    wait_until(lambda: not study.busy("plain") and not study.busy("full"))
    for run in runs:
        assert "told to stop; the run goes on from its checkpoint" in (run / "log.txt").read_text()
        assert 0 < load_checkpoint(run / LAST)["step"] < 100000
        assert not list(run.glob("*.tmp"))
    assert study.records() == set()


def test_a_killed_cell_is_named_and_the_others_go_on(
    study: Study, done: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = study.run("plain") / "log.txt"
    log.parent.mkdir(parents=True)
    log.write_text("UserError: of another time\n")
    popen = subprocess.Popen

    def start(command: list[str], **more: Any) -> subprocess.Popen[str]:
        process = popen(command, **more)
        if study.run("plain").name in command[-1]:
            process.kill()
        return process

    monkeypatch.setattr(grid.subprocess, "Popen", start)
    said = study.call("--jobs", "1")
    assert said.code == 1
    assert "1 runs finished" in said.err
    assert f"failed: {NAME.format('plain')}: ended by signal 9 (Killed) ({log})" in said.err
    assert without_times(study.record("full")) == without_times(done.record("full"))

    monkeypatch.undo()
    said = study.call("--jobs", "1")
    assert said.code == 0
    assert "2 cells, 1 runs left to do" in said.err
    assert without_times(study.record("plain")) == without_times(done.record("plain"))


def test_a_cell_that_was_killed_before_its_first_checkpoint_begins_again(study: Study, done: Study) -> None:
    """Where validations are more frequent than checkpoints, its best model is there long before its last."""
    study.run("plain").mkdir(parents=True)
    shutil.copy(done.run("plain") / BEST, study.run("plain"))
    said = study.call("--variant", "plain")
    assert said.code == 0
    assert without_times(study.record("plain")) == without_times(done.record("plain"))


def test_a_cell_that_another_process_is_at_is_left_alone(study: Study) -> None:
    with exclusive(study.run("plain") / "run"):
        said = study.call("--variant", "plain")
    assert said.code == 0
    assert f"another process is at {NAME.format('plain')}" in said.err
    assert "0 runs finished" in said.err
    assert "failed" not in said.err
    assert study.records() == set()
    assert not (study.run("plain") / LAST).exists()


def test_two_grids_at_once_share_the_work(study: Study, done: Study) -> None:
    outcomes: list[Outcome] = []

    def run() -> None:
        outcomes.append(run_grid(study.spec.cells, study.places, splits=study.spec.splits, versions={}, jobs=1))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 2
    for outcome in outcomes:
        assert outcome.failed == {}
        assert not outcome.interrupted
    assert {cell.variant for outcome in outcomes for cell in outcome.finished} == {"plain", "full"}
    for variant in ("plain", "full"):
        assert without_times(study.record(variant)) == without_times(done.record(variant))
        # Whoever trains opens a file of events.
        assert len(list((study.run(variant) / "tensorboard").iterdir())) == 1


def test_a_cell_that_another_grid_has_finished_since_is_not_run_again(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def finish_both(self: grid._Runner, number: int, cell: Cell, bar: object) -> tuple[int, str]:
        ran.append(cell.variant)
        for each in study.spec.cells:
            path = study.places.record(each)
            path.parent.mkdir(exist_ok=True)
            path.touch()
        return 0, ""

    monkeypatch.setattr(grid._Runner, "_run", finish_both)
    outcome = run_grid(study.spec.cells, study.places, splits=study.spec.splits, versions={}, jobs=1)
    assert ran == ["plain"]
    assert [cell.variant for cell in outcome.finished] == ["plain"]


def test_a_worker_leaves_a_cell_alone_that_has_a_record(study: Study, tmp_path: Path) -> None:
    """Another grid may finish it between the look at the record and the lock."""
    record = tmp_path / "record.json"
    record.write_text("of another grid")
    order = {
        "settings": study.cell("plain").settings.to_dict(),
        "directory": str(tmp_path / "run"),
        "record": str(record),
        "splits": ["val"],
        "machine": {},
        "cache": str(study.cache),
        "threads": 1,
    }
    command = [sys.executable, "-m", "attbalance_ext.grounding.experiment.worker", json.dumps(order)]
    read, write = os.pipe()  # open as long as the worker lives: its end would stop it
    done = subprocess.run(command, stdin=read, capture_output=True, text=True, check=False)
    os.close(read)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    assert record.read_text() == "of another grid"
    assert not (tmp_path / "run" / LAST).exists()


def test_a_place_that_cannot_be_written_to_fails_its_cells(study: Study) -> None:
    study.places.runs.write_text("a file")
    said = study.call("--jobs", "1")
    assert said.code == 1
    for variant in ("plain", "full"):
        assert f"failed: {NAME.format(variant)}: [Errno" in said.err


def test_a_mistake_of_ours_stops_the_grid_and_surfaces(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the cell before it is not done yet."""

    def fail_second(self: grid._Runner, number: int, cell: Cell, bar: object) -> tuple[int, str]:
        if number == 1:
            raise ZeroDivisionError
        assert self.stop.wait(60)
        return worker.INTERRUPTED, ""

    monkeypatch.setattr(grid._Runner, "_run", fail_second)
    with pytest.raises(ZeroDivisionError):
        run_grid(study.spec.cells, study.places, splits=study.spec.splits, versions={}, jobs=2)


# --- one cell ---------------------------------------------------------------------------------------------------------


def test_a_run_of_other_settings_is_left_alone(done: Study, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(done.run("plain"), run)
    before = (run / LAST).read_bytes()
    settings = done.cell("plain").settings
    for changes in ({"steps": STEPS + 1}, {"epochs": 3, "momentum": 0.5}, {"seed": 1}):
        with pytest.raises(UserError, match=r"run holds a run of other settings; remove it, or choose another --runs"):
            run_cell(
                replace(settings, **changes), run, tmp_path / "a.json", splits=["val"], machine={}, cache=done.cache
            )
    assert (run / LAST).read_bytes() == before
    assert not (tmp_path / "a.json").exists()


def test_a_finished_run_is_only_evaluated(done: Study, tmp_path: Path) -> None:
    """Also where it was computed otherwise."""
    run = tmp_path / "run"
    shutil.copytree(done.run("full"), run)
    settings = replace(done.cell("full").settings, checkpoint_every=None, workers=1)
    steps: list[int] = []
    run_cell(
        settings,
        run,
        tmp_path / "a.json",
        splits=["val"],
        machine={},
        cache=done.cache,
        after_step=lambda trainer: steps.append(trainer.step),
    )
    assert steps == []
    record, first = load_record(tmp_path / "a.json"), done.record("full")
    assert record.results == {"val": first.results["val"]}
    assert (record.curve, record.seconds) == (first.curve, first.seconds)


def test_a_run_that_counts_in_epochs_goes_on(cache: Path, study: Study, tmp_path: Path) -> None:
    settings = replace(study.cell("plain").settings, epochs=1, batch_size=32, checkpoint_every=2, pretrain_steps=0)
    reached: list[int] = []

    def stop_once(trainer: Trainer) -> None:
        reached.append(trainer.step)
        if len(reached) == 3:
            raise ZeroDivisionError

    def run() -> None:
        run_cell(
            settings,
            tmp_path / "run",
            tmp_path / "a.json",
            splits=["val"],
            machine={},
            cache=cache,
            after_step=stop_once,
        )

    with pytest.raises(ZeroDivisionError):
        run()
    run()
    assert reached[:4] == [1, 2, 3, 3]  # from the checkpoint at step 2
    assert reached[-1] == load_checkpoint(tmp_path / "run" / LAST)["step"]
    run()  # finished: evaluated again
    assert Settings.from_dict(load_record(tmp_path / "a.json").settings) == settings


def test_data_that_are_missing_are_missed_before_training(study: Study, tmp_path: Path) -> None:
    settings = study.cell("plain").settings
    with pytest.raises(UserError, match="no split 'testA'"):
        run_cell(
            settings, tmp_path / "run", tmp_path / "a.json", splits=["val", "testA"], machine={}, cache=study.cache
        )
    assert not (tmp_path / "run").exists()


# --- pieces -----------------------------------------------------------------------------------------------------------


def test_a_listener_that_is_gone_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the end of the input for that, which lets the run save itself."""
    read, write = os.pipe()
    os.close(read)
    file = open(write, "w")  # noqa: SIM115
    monkeypatch.setattr("sys.stdout", file)
    worker.say({"step": 1, "accuracy": None})
    monkeypatch.undo()
    with pytest.raises(BrokenPipeError):
        file.close()


def test_as_many_at_a_time_as_there_are_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert [default_jobs("cpu", threads) for threads in (1, 2, 4, 8)] == [6, 3, 1, 1]
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert default_jobs("cpu", 2) == 2
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert default_jobs("cpu", 1) == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert default_jobs("cuda", 1) == 3 * default_jobs("cuda:1", 1) > 3


def test_equal_cells_are_left_once_and_in_order(cache: Path, tmp_path: Path) -> None:
    study = Study(tmp_path / "study", cache, TOP + "[variants.same]\nattbalance = false\n[variants.full]\n")
    places = Places(tmp_path / "records", tmp_path / "runs")
    assert [cell.variant for cell in places.left(study.spec.cells)] == ["plain", "full"]
    record = places.record(study.cell("same"))
    record.parent.mkdir()
    record.touch()
    assert [cell.variant for cell in places.left(study.spec.cells)] == ["full"]
