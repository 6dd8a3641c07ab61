"""The command line on a few scenes: mistakes are one line and exit code 2, and the commands work together."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch._inductor.config
from helpers_command import FEW_SCENES, call

from attbalance_ext import available_backends
from attbalance_ext.grounding.files import load_checkpoint, save_checkpoint
from attbalance_ext.grounding.runs import resume_run

SMALL = ["--steps", "8", "--batch-size", "8", "--validate-every", "4", "--pretrain-steps", "2"]

pytestmark = pytest.mark.usefixtures("few_scenes")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--model", "nope"], "unknown model 'nope'; there is: transvg-tiny"),
        (["train", "--data", "builtin:nope"], "builtin:refcoco, builtin:refcoco+"),
        (["train", "--data", "nope"], "builtin:refcoco, builtin:refcoco+"),
        (["train", "--rule", "nope"], "touch, center, coverage, nearest"),
        (["train", "--backend", "nope"], "auto, reference, cpu"),
        (["train", "--device", "tpu"], "cpu, cuda"),
        (["train", "--clip", "0"], "clip must be above 0"),
        (["train", "--size", "65"], "64 or 128"),
        (["train", "--seed", str(2**62)], f"seed must lie between -2**43 and 2**43, got {2**62}"),
        (["train", "--pretrain-steps", "-5"], "pretrain_steps must be at least 0, got -5"),
        (["train", "--rho", "nope"], "batch, global, ema, off"),
        (["train", "--difficulty-from", "nope"], "sum, mean, last"),
        (["train", "--resume", "no-such-run"], "no checkpoint at no-such-run/last.pt"),
        (["eval", "no-such-run"], "no run at no-such-run"),
        (["rho", "no-such-run"], "no run at no-such-run"),
        (["report", "no-such-run"], "no run at no-such-run"),
        (["demo", "--data", "builtin:nope"], "builtin:refcoco, builtin:refcoco+"),
        (["data", "card", "builtin:nope"], "builtin:refcoco, builtin:refcoco+"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert says in printed.err
    assert list(tmp_path.iterdir()) == []


def test_numbers_for_other_layers_than_there_are_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert call("train", "--out", run, *SMALL, "--rho", "0.1,0.2") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "attbalance: rho: transvg-tiny supervises 3 layers, and there are 2 numbers for them"
    assert not run.exists()
    assert call("train", "--out", run, *SMALL, "--rho", "0.1,0.2,0.3") == 0


@pytest.mark.parametrize("name", [name for name, reasons in available_backends().items() if reasons])
def test_a_backend_that_cannot_run_here_says_why(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--backend", name, "--out", tmp_path / "run") == 2
    assert f"backend {name!r} cannot run here: {available_backends()[name][0]}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments", [[], *[[c] for c in ("info", "train", "experiment", "eval", "rho", "report", "demo", "data")]]
)
def test_every_command_has_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments, "--help") == 0
    assert "Usage" in capsys.readouterr().out


def call_without_typer(tmp_path: Path, command: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\", name='typer')\n")
    return subprocess.run(
        [sys.executable, "-m", "attbalance_ext.cli", command],
        env={
            **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
            "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_the_extra_the_command_says_what_to_install(tmp_path: Path) -> None:
    result = call_without_typer(tmp_path, "train")
    assert result.returncode == 2
    assert result.stderr.strip() == "attbalance: the command line needs 'typer': pip install 'attbalance_ext[train]'"


def test_info_needs_no_extra(tmp_path: Path) -> None:
    result = call_without_typer(tmp_path, "info")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(r"reference +\S+e-\d+  ok", result.stdout)
    assert re.search(r"cuda +cannot run here: \S+", result.stdout)


def test_info_has_the_options_of_the_library_s_own_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("info", "--json", "--require", "cpu") == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    assert call("info", "--require", "gpu") == 2
    assert "--require must be one of reference, cpu, triton, cuda, got 'gpu'" in capsys.readouterr().err


def test_train_eval_rho_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "full"
    assert call("train", "--out", run, *SMALL, "--alpha-ar", "0.5", "--rho", "0.1,0.2,0.3") == 0
    settings = json.loads((run / "settings.json").read_text())
    assert settings["loss"]["alpha_ar"] == 0.5
    assert settings["loss"]["rho"] == [0.1, 0.2, 0.3]
    assert {"last.pt", "best.pt", "history.json", "tensorboard"} <= {path.name for path in run.iterdir()}
    capsys.readouterr()

    assert call("eval", run, "--split", "test", "--json") == 0
    metrics = json.loads(capsys.readouterr().out)
    assert 0 <= metrics["acc50"] <= 1
    assert len(metrics["in_box"]) == 4
    assert call("rho", run) == 0
    assert f"{metrics['rho'][-1]:+.3f}" in capsys.readouterr().out
    assert call("report", run, "--out", tmp_path / "page.html") == 0
    assert "Grounding report" in (tmp_path / "page.html").read_text()

    assert call("train", "--out", run, *SMALL) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert call("train", "--resume", run, "--lr", "0.1") == 2
    assert "leave out --lr" in capsys.readouterr().err
    assert call("eval", run, "--split", "nope") == 2
    assert "train, val, test, test_novel" in capsys.readouterr().err


def test_compile_without_a_compiler_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert call("train", "--out", run, *SMALL) == 0
    state = load_checkpoint(run / "last.pt")
    assert state["settings"]["compile"] is False
    del state["format"]
    save_checkpoint(run / "last.pt", {**state, "settings": {**state["settings"], "compile": True}})
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for arguments in (["--compile", "--out", tmp_path / "new", *SMALL], ["--resume", run]):
        capsys.readouterr()
        with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
            assert call("train", *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("attbalance: --compile needs a C++ compiler")
        assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert call("eval", run / "last.pt") == 0  # nothing is compiled there


def test_a_backend_from_the_environment_is_checked_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, says in (("nope", "there is: auto, reference, cpu"), ("cuda", "cannot run here")):
        monkeypatch.setenv("ATTBALANCE_BACKEND", name)
        assert call("train", "--out", tmp_path / "run", *SMALL) == 2
        assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_of_something_else_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert call("train", "--out", run, *SMALL) == 0
    good = load_checkpoint(run / "last.pt")
    del good["format"]
    for change, says in (
        ({"settings": None}, "settings that cannot be used"),
        ({"settings": {**good["settings"], "steps": "many"}}, "settings that cannot be used"),
        ({"settings": {**good["settings"], "loss": {"alpha": 1.0}}}, "settings that cannot be used"),
        ({"model": {}}, "does not hold the weights of a transvg-tiny"),
    ):
        save_checkpoint(tmp_path / "other.pt", {**good, **change})
        capsys.readouterr()
        assert call("eval", tmp_path / "other.pt") == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
    save_checkpoint(tmp_path / "other.pt", {"encoder": {}})
    assert call("eval", tmp_path / "other.pt") == 2
    assert "not a run's checkpoint: it has no log, model" in capsys.readouterr().err


def test_demo_compares_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert call("demo", "--out", out, "--steps", "4", "--pretrain-steps", "2") == 0
    table = capsys.readouterr().out
    for expected in ("acc@0.5", "mean IoU", "in-box", "ms per step", "plain", "attbalance"):
        assert expected in table
    states = {name: load_checkpoint(out / name / "last.pt") for name in ("plain", "attbalance")}
    assert not states["plain"]["settings"]["attbalance"]
    assert states["attbalance"]["settings"]["attbalance"]
    differing = [k for k, v in states["plain"]["settings"].items() if v != states["attbalance"]["settings"][k]]
    assert differing == ["attbalance"]
    assert "with and without AttBalance" in (out / "report.html").read_text()
    assert call("demo", "--out", out, "--steps", "4", "--pretrain-steps", "2") == 0  # a finished demo is replaced
    (out / ".demo").unlink()
    before = (out / "plain" / "last.pt").read_bytes()
    capsys.readouterr()
    assert call("demo", "--out", out, "--steps", "4", "--pretrain-steps", "2") == 2  # somebody's runs are not
    assert "already holds a run" in capsys.readouterr().err
    assert (out / "plain" / "last.pt").read_bytes() == before


LAUNCH = """
import sys
from attbalance_ext.grounding.data.generate import SCENES
SCENES.update({scenes})
from attbalance_ext.cli import main
main()
"""


def test_ctrl_c_leaves_a_checkpoint_that_resumes(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["train", "--out", str(run), "--steps", "100000", "--validate-every", "5", "--batch-size", "4"]
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH.format(scenes=FEW_SCENES), *arguments, "--pretrain-steps", "0"],
        env={**os.environ, "ATTBALANCE_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (run / "history.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    said = re.search(
        r"stopped at step (\d+); checkpoint: (\S+); continue with: attbalance train --resume (\S+)", message
    )
    assert said is not None, message
    assert Path(said[2]) == run / "last.pt"
    assert load_checkpoint(run / "last.pt")["step"] == int(said[1])
    assert not list(run.glob(".*.tmp"))
    unfinished, other = run / ".last.pt.1-0a.tmp", run / ".note.tmp"  # as SIGKILL leaves a checkpoint being written
    for path in (unfinished, other):
        path.touch()
    resumed = resume_run(run, cache=cache)
    assert not unfinished.exists()
    assert other.exists()
    resumed.advance()
    assert resumed.step == int(said[1]) + 1
