"""Clocks, locales, time zones, and the names that people give to their folders: none of them changes a bit."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from helpers_command import Command, assert_same_end, call
from helpers_faults import OPTIONS, without_override, write_own_data

pytestmark = pytest.mark.usefixtures("few_scenes")


def test_a_clock_that_is_set_back(whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an hour at every look, from 1970 on; what is timed is timed by another clock."""
    now = [0.0]

    def back() -> float:
        now[0] -= 3600
        return now[0] + 7200

    monkeypatch.setattr(time, "time", back)
    run = tmp_path / "run"
    assert call("train", "--out", run, *OPTIONS) == 0
    assert now[0] < 0
    assert_same_end(run, whole_run)
    records = json.loads((run / "history.json").read_text())["train"]
    assert all(record["step_ms"] > 0 for record in records)


def test_locales_and_time_zones(whole_run: Path, tmp_path: Path, cache: Path) -> None:
    """A locale without a letter beyond ASCII, and a time zone that the system does not know."""
    environment = {"LC_ALL": "C", "TZ": "Nowhere/At all", "PYTHONIOENCODING": "ascii"}
    run = tmp_path / "ein Lauf, größer 运行"
    Command(tmp_path, cache, environment=environment).run("train", "--out", run, *OPTIONS)
    assert_same_end(run, whole_run)


COMMA = """
import locale
locale.setlocale(locale.LC_ALL, "de_DE")
assert locale.localeconv()["decimal_point"] == ","
"""


def test_a_locale_with_decimal_commas(whole_run: Path, tmp_path: Path, cache: Path) -> None:
    """As a program that embeds Python may set it: numbers in files keep their points."""
    made = shutil.which("localedef") is not None and subprocess.run(
        ["localedef", "-i", "de_DE", "-f", "UTF-8", str(tmp_path / "de_DE")], capture_output=True
    )
    if not made or made.returncode > 1:  # 1: warnings
        pytest.skip("no locale with decimal commas can be made here")
    run = tmp_path / "run"
    command = Command(tmp_path, cache, prelude=COMMA, environment={"LOCPATH": str(tmp_path)})
    command.run("train", "--out", run, *OPTIONS, "--lr", "0.003")
    assert_same_end(run, whole_run)


NAMES = [
    "with space",
    "[b=1] :cat:",
    "closed[/b]",
    "größer 数据 の",
    'it\'s $HOME & "more"',
    os.fsdecode(b"no text \xff"),
]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_folders_and_images(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the run, the data, the images, the cache and the page; also one that is no text in any encoding."""
    # pytest's processes tell each other what is printed and logged, and only in UTF-8: nothing must be left of it.
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    monkeypatch.setenv("ATTBALANCE_CACHE", str(tmp_path / name / "cache"))
    image = name.replace("/", ":") if name.isprintable() else "image"  # JSON has nothing but text
    root = write_own_data(tmp_path / name / "data", [f"{image} {number}" for number in range(8)])
    run, page = tmp_path / name / "run", tmp_path / name / "page.html"
    options = ["--steps", "2", "--batch-size", "4", "--pretrain-steps", "0", "--validate-every", "1"]
    assert call("train", "--data", "own", "--data-root", root, "--out", run, *options) == 0
    printed = str(run / "best.pt").encode(errors="backslashreplace").decode()
    assert f", in {printed}\n" in capsys.readouterr().err
    assert call("train", "--resume", run) == 0
    capsys.readouterr()
    assert call("eval", run, "--split", "val", "--json") == 0
    assert json.loads(capsys.readouterr().out)["run"] == str(run)
    assert call("eval", run, "--split", "val") == 0
    assert call("report", run, "--split", "val", "--out", page) == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert call("data", "check", root, "--images") == 0
    capsys.readouterr()


def test_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a container's user that the system does not know."""

    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    monkeypatch.delenv("ATTBALANCE_CACHE", raising=False)
    assert call("train", "--out", tmp_path / "run", *OPTIONS) == 2
    assert "has no home: give a folder by --cache or ATTBALANCE_CACHE" in capsys.readouterr().err


@pytest.mark.parametrize("cache", ["/dev/null", "/proc/nothing", "file"])
def test_a_cache_that_takes_no_files(cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert call("train", "--out", tmp_path / "run", *OPTIONS, "--cache", tmp_path / cache) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"attbalance: {tmp_path / cache}")
    assert said.endswith(": give a folder by --cache or ATTBALANCE_CACHE\n")


LONG = "x" * 300


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--out", LONG, *OPTIONS],
        ["train", "--resume", LONG],
        ["train", "--data", "own", "--data-root", LONG, *OPTIONS],
        ["eval", LONG],
        ["data", "check", LONG],
        ["report", LONG],
    ],
    ids=lambda command: " ".join(command)[:20],
)
def test_a_name_that_is_too_long(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*command) in (1, 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert LONG in said
    assert said.endswith("File name too long\n")


@pytest.mark.parametrize("permissions", [0o000, 0o311])
@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("run", ["train", *OPTIONS, "--out"]),
        ("run", ["train", "--resume"]),
        ("run", ["eval"]),
        ("data", ["data", "check"]),
        ("data", ["train", "--data", "own", "--data-root"]),
    ],
)
def test_a_folder_that_may_not_be_looked_into(
    kind: str, command: list[str], permissions: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "run" and permissions:
        pytest.skip("nothing is looked for in a run whose name is not known")
    locked = tmp_path / kind
    write_own_data(locked, [f"{number}.jpg" for number in range(8)])
    locked.chmod(permissions)
    try:
        with without_override():
            assert call(*command, locked) == 1
    finally:
        locked.chmod(0o700)
    said = capsys.readouterr().err
    assert said.startswith(f"attbalance: {locked}")
    assert said.endswith(": Permission denied\n")
    assert said.count("\n") == 1
