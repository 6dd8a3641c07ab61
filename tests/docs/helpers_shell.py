"""Could one type these shell commands? Looked up, not run: programs, subcommands, options, files."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run
import typer

import benchmarks.__main__
from attbalance_ext.grounding import commands

ROOT = Path(__file__).resolve().parents[2]
MARKERS = ("gpu", "slow")


class WrongCommand(AssertionError):
    """What is wrong with a command of the documentation."""


class Incomplete(WrongCommand):
    """An argument is missing: wrong in a block, fine in a sentence that only names a command."""


def commands_of(code: str) -> list[str]:
    """The commands of a block, one a line, without comments and placeholders for more options."""
    joined = re.sub(r"\\\n\s*", " ", code)
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def check(command: str) -> None:
    """Raise :class:`WrongCommand` unless every part of the command exists."""
    words = [word for word in shlex.split(command, comments=True) if word != "..."]
    while words and re.match(r"[A-Z_]+=", words[0]):
        _check_variable(words.pop(0).partition("=")[0])
    if not words:
        raise WrongCommand(f"no command in {command!r}")
    program, arguments = words[0], words[1:]
    if program.startswith("scripts/"):
        _check_script(program)
    elif program in _PROGRAMS:
        _PROGRAMS[program](arguments)
    else:
        raise WrongCommand(f"unknown program {program!r}: teach tests/docs/helpers_shell.py about it")


def _check_variable(name: str) -> None:
    known = [*ROOT.glob("setup.py"), *ROOT.glob("CMakeLists.txt"), *(ROOT / "attbalance_ext").rglob("*.py")]
    if not any(name in file.read_text() for file in known):
        raise WrongCommand(f"nothing reads the environment variable {name}")


def _check_script(path: str) -> None:
    script = ROOT / path
    if not script.is_file() or not os.access(script, os.X_OK):
        raise WrongCommand(f"{path} is no executable file")


def _make(arguments: list[str]) -> None:
    # What the environment is made from counts as old, so that the answer is about the target alone.
    command = ["make", "--dry-run", "--old-file", ".venv/.installed", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise WrongCommand(done.stderr.strip())
    makefile = (ROOT / "Makefile").read_text()
    for name in (word.partition("=")[0] for word in arguments if "=" in word):
        if f"$({name})" not in makefile:
            raise WrongCommand(f"the Makefile does not read {name}")


def _application(app: typer.Typer, name: str) -> Callable[[list[str]], None]:
    """Parses as the command line would, down to the types and ranges of the options, and calls nothing."""

    def parse(arguments: list[str]) -> None:
        command = _without_callbacks(typer.main.get_command(app))
        try:
            command.main([word for word in arguments if word != "--help"], prog_name=name, standalone_mode=False)
        except Exception as error:
            if not hasattr(error, "format_message"):  # click's own; typer may bring its own copy of click
                raise
            said = error.format_message()
            raise (Incomplete if said.startswith("Missing") else WrongCommand)(f"{name}: {said}") from None

    return parse


def _without_callbacks(command: Any) -> Any:
    command.callback = None
    for subcommand in getattr(command, "commands", {}).values():
        _without_callbacks(subcommand)
    return command


_trainer = _application(commands.app, "attbalance")
_benchmarks = _application(benchmarks.__main__.app, "python -m benchmarks")


def _attbalance(arguments: list[str]) -> None:
    if arguments[:1] == ["bench"]:
        _benchmarks(arguments[1:])
    else:
        _trainer(arguments)


def _python(arguments: list[str]) -> None:
    if arguments[:1] != ["-m"]:
        if not arguments or not (ROOT / arguments[0]).is_file():
            raise WrongCommand(f"python is given no file of the checkout: {arguments}")
        return
    module, rest = arguments[1], arguments[2:]
    if module == "benchmarks":
        _benchmarks(rest)
    elif module == "attbalance_ext.cli":
        _attbalance(rest)
    elif importlib.util.find_spec(module) is None:
        raise WrongCommand(f"there is no module {module}")
    else:
        _options(module, rest, _help(module))


def _torchrun(arguments: list[str]) -> None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            known = torch.distributed.run.get_args_parser().parse_args(arguments)
    except SystemExit:
        raise WrongCommand(f"torchrun: {said.getvalue().strip().splitlines()[-1]}") from None
    _python(["-m"] * known.module + [known.training_script, *known.training_script_args])


def _pip(arguments: list[str]) -> None:
    _options("pip", arguments[1:], _help_of_a_process("pip", arguments[0]))
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(arguments)):
        for extra in extras.split(","):
            if f"\n{extra} = [" not in (ROOT / "pyproject.toml").read_text():
                raise WrongCommand(f"pyproject.toml has no extra {extra!r}")


def _pytest(arguments: list[str]) -> None:
    _options("pytest", arguments, _help_of_a_process("pytest", "--noconftest"))
    for before, word in zip(["", *arguments], arguments, strict=False):
        if before == "-m" and not any(marker in word for marker in MARKERS):
            raise WrongCommand(f"pytest has no marker {word!r}")
        if word.startswith("tests") and not (ROOT / word).exists():
            raise WrongCommand(f"there is no {word}")


def _options(program: str, arguments: list[str], known: str) -> None:
    for word in arguments:
        option = word.partition("=")[0]
        if option.startswith("-") and not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", known):
            raise WrongCommand(f"{program} has no option {option}")


@functools.cache
def _help(module: str) -> str:
    """What ``python -m module --help`` prints: in this process, where PyTorch is imported already."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        patch.setattr(sys, "argv", [module, "--help"])
        runpy.run_module(module, run_name="__main__")
    return said.getvalue()


@functools.cache
def _help_of_a_process(*program: str) -> str:
    done = subprocess.run([sys.executable, "-m", *program, "--help"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise WrongCommand(f"{' '.join(program)} --help: {done.stderr.strip()}")
    return done.stdout


_PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "attbalance": _attbalance,
    "make": _make,
    "pip": _pip,
    "pytest": _pytest,
    "python": _python,
    "torchrun": _torchrun,
}
