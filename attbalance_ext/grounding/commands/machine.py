"""``attbalance info`` and ``attbalance bench``: this machine, this installation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

import attbalance_ext
from attbalance_ext import available_backends
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.info import environment, self_check


def register(app: typer.Typer) -> None:
    app.command()(info)
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(
        bench
    )


def info() -> None:
    """Say what is installed, which backends can run here (and why others cannot), and check that they agree.

    Exit code 1 when a backend disagrees with the reference.
    """
    console = Console()
    for name, value in environment().items():
        console.print(f"{name:16} {value}", highlight=False)
    table = Table("backend", "runs here", "worst relative error", title="backends", title_justify="left")
    checks = {check.backend: check for check in self_check()}
    for name, reasons in available_backends().items():
        check = checks.get(name)
        if check is None:
            table.add_row(name, f"no: {'; '.join(reasons)}", "")
        else:
            table.add_row(name, "yes", f"{check.error:.1e} {'ok' if check.passed else 'TOO LARGE'}")
    console.print(table)
    if not all(check.passed for check in checks.values()):
        raise typer.Exit(1)


def bench(context: typer.Context) -> None:
    """Run the benchmarks of a source checkout: the same as 'python -m benchmarks'. Try: attbalance bench run --help"""
    checkout = Path(attbalance_ext.__file__).parent.parent
    if not (checkout / "benchmarks" / "__main__.py").exists():
        raise UserError("the benchmarks come with the source checkout, not with the installed package")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout), *sys.path])}
    raise typer.Exit(subprocess.call([sys.executable, "-m", "benchmarks", *context.args], env=environment))
