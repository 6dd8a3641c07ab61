"""``attbalance info`` and ``attbalance bench``: this machine, this installation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

import attbalance_ext
from attbalance_ext import available_backends
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.info import print_report


def register(app: typer.Typer) -> None:
    app.command()(info)
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(
        bench
    )


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    require: Annotated[list[str] | None, typer.Option(help="Exit code 1 if this backend cannot run here.")] = None,
) -> None:
    """Say what is installed, which backends run here, whether they agree, why others do not run and what to do.

    Exit code 1 when a backend disagrees with the reference, or when one that --require or ATTBALANCE_BACKEND names
    cannot run here. Without the extra 'train': python -m attbalance_ext.info.
    """
    for name in require or ():
        if name not in available_backends():
            raise UserError(f"--require must be one of {', '.join(available_backends())}, got {name!r}")
    raise typer.Exit(0 if print_report(require or (), as_json) else 1)


def bench(context: typer.Context) -> None:
    """Run the benchmarks of a source checkout: the same as 'python -m benchmarks'. Try: attbalance bench run --help"""
    checkout = Path(attbalance_ext.__file__).parent.parent
    if not (checkout / "benchmarks" / "__main__.py").exists():
        raise UserError("the benchmarks come with the source checkout, not with the installed package")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout), *sys.path])}
    raise typer.Exit(subprocess.call([sys.executable, "-m", "benchmarks", *context.args], env=environment))
