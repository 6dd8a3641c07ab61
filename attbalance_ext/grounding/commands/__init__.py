"""The command line, one module per group of commands. Commands only translate: the work is done elsewhere."""

from __future__ import annotations

import io
import os
import sys

import typer

from attbalance_ext import BackendUnavailable
from attbalance_ext.grounding.commands import analyse, datasets, demo, experiment, machine, rho, train
from attbalance_ext.grounding.errors import NotWritten, TrainingFailed, UserError

app = typer.Typer(
    name="attbalance",
    help="Train and study visual grounding models with the AttBalance loss. Start with: attbalance demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for module in (machine, demo, train, experiment, analyse, rho, datasets):
    module.register(app)


def run() -> int:
    """Run the command line on ``sys.argv``; gives back the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that the terminal has no letters for
    try:
        app()
    except (UserError, BackendUnavailable) as error:
        return _complain(error, 2)
    except (TrainingFailed, NotWritten) as error:
        return _complain(error, 1)
    except OSError as error:
        if error.filename is None:
            raise  # nothing that a user could look at
        return _complain(f"{os.fspath(error.filename)}: {error.strerror}", 1)
    return 0


def _complain(error: Exception | str, code: int) -> int:
    print(f"attbalance: {' '.join(str(error).split())}", file=sys.stderr)
    return code
