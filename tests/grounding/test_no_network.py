"""Nothing goes to the network unless somebody asked for weights: imports, training, evaluation, reports.

A process of its own is watched by an audit hook, which sees whatever is asked of Python's sockets, notes it and refuses
it. Sockets of compiled code it does not see; what downloads here (huggingface_hub) asks with Python's first.
`HF_HUB_OFFLINE` is not set.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_command import FEW_SCENES

WATCH = f"""
import os, pkgutil, importlib, sys, time

NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostby", "socket.send")

def watch(event, arguments):
    if not event.startswith(NETWORK):
        return
    # A connection's address comes after the socket; that of a socket between processes of this machine is a path.
    if event == "socket.connect" and not isinstance(arguments[1], tuple):
        return
    with open(os.environ["ATTEMPTS"], "a") as file:  # processes forked from this one are watched too
        file.write(f"{{event}} {{arguments}}\\n")
    raise OSError("this process may not use the network")

sys.addaudithook(watch)
time.sleep = lambda seconds: None  # who tries again need not wait

from attbalance_ext.grounding.data.generate import SCENES
SCENES.update({FEW_SCENES})
from attbalance_ext.cli import main

def run(*arguments):
    sys.argv = ["attbalance", *arguments]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, arguments
"""

EVERY_MODULE = """
import attbalance_ext
names = [module.name for module in pkgutil.walk_packages(attbalance_ext.__path__, "attbalance_ext.")]
assert len(names) > 80, names
for name in names:
    importlib.import_module(name)
"""

EVERY_STEP = """
run("info")
steps = ("--steps", "4", "--validate-every", "2", "--pretrain-steps", "2")
run("train", *steps, "--batch-size", "8", "--workers", "2", "--out", "run")
run("train", "--resume", "run")
run("eval", "run", "--split", "test")
run("rho", "run", "--split", "test", "--out", "rho")
run("report", "run", "--out", "report.html")
run("data", "card", "builtin:refcoco")
"""

WEIGHTS = 'run("train", "--steps", "1", "--tokenizer", "somebody/some-tokenizer", "--out", "run")'


def watched(program: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What a watched process printed, and what it wanted of the network."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    attempts = folder / "attempts"
    environment |= {
        "ATTEMPTS": str(attempts),
        "ATTBALANCE_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "hub"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", WATCH + program]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    return done, attempts.read_text().splitlines() if attempts.exists() else []


@pytest.mark.slow
def test_nothing_is_asked_of_the_network(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("triton")
    done, attempts = watched(EVERY_MODULE + EVERY_STEP, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert attempts == []


def test_weights_by_hub_id_are_asked_for_and_the_network_that_is_missing_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    done, attempts = watched(WEIGHTS, tmp_path)
    assert "huggingface.co" in attempts[0]
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("attbalance: ")]
    assert len(said) == 1
    assert (
        "tokenizer 'somebody/some-tokenizer' cannot be loaded: We couldn't connect to 'https://huggingface.co'"
        in said[0]
    )
