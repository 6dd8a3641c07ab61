"""``attbalance info`` and ``attbalance bench``: this machine, this installation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import typer

import attbalance_ext
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.info import print_report


def register(app: typer.Typer) -> None:
    app.command()(info)
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(
        bench
    )


def info() -> None:
    """Say what is installed, which backends can run here (and why others cannot), and check that they agree.

    Exit code 1 when a backend disagrees with the reference.
    """
    raise typer.Exit(0 if print_report() else 1)


def bench(context: typer.Context) -> None:
    """Run the benchmarks of a source checkout: the same as 'python -m benchmarks'. Try: attbalance bench run --help"""
    checkout = Path(attbalance_ext.__file__).parent.parent
    if not (checkout / "benchmarks" / "__main__.py").exists():
        raise UserError("the benchmarks come with the source checkout, not with the installed package")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout), *sys.path])}
    raise typer.Exit(subprocess.call([sys.executable, "-m", "benchmarks", *context.args], env=environment))
