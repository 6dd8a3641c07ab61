"""The process that runs one cell: ``python -m attbalance_ext.grounding.experiment.worker ORDER``.

Its order is JSON; it answers with lines of JSON on standard output. A process of its own means that a cell that dies
takes no other with it. Where its standard input ends, whoever gave the order is gone, and it stops as on SIGTERM: after
the current step, with a checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from attbalance_ext.grounding.alone import alone_in
from attbalance_ext.grounding.errors import NotWritten, TrainingFailed, UserError
from attbalance_ext.grounding.experiment.cell import run_cell
from attbalance_ext.grounding.fit import Interrupted
from attbalance_ext.grounding.settings import Settings
from attbalance_ext.grounding.train import Trainer

INTERRUPTED, BUSY, FAILED = 130, 75, 1
"""Exit codes: told to stop; another process is at this cell; see the message."""


def main() -> int:
    order = json.loads(sys.argv[1])
    threading.Thread(target=_stop_with_input, daemon=True).start()
    torch.set_num_threads(order["threads"])
    directory, record = Path(order["directory"]), Path(order["record"])
    with alone_in(directory) as alone:
        if not alone:
            return BUSY
        if record.exists():
            return 0  # another process has finished it since
        try:
            run_cell(
                Settings.from_dict(order["settings"]),
                directory,
                record,
                splits=order["splits"],
                machine=order["machine"],
                cache=Path(order["cache"]) if order["cache"] else None,
                after_step=Reporter(),
            )
        except Interrupted:
            print("told to stop; the run goes on from its checkpoint", file=sys.stderr)
            return INTERRUPTED
        except (UserError, TrainingFailed, NotWritten) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return FAILED
    return 0


class Reporter:
    """Says where a run is, twice a second at most."""

    def __init__(self) -> None:
        self.said = 0.0

    def __call__(self, trainer: Trainer) -> None:
        if time.monotonic() - self.said < 0.5 and not trainer.finished:
            return
        self.said = time.monotonic()
        validation = trainer.log.history["validation"]
        say({"step": trainer.step, "accuracy": validation[-1]["acc50"] if validation else None})


def say(what: dict[str, Any]) -> None:
    with suppress(BrokenPipeError):  # nobody listens any more: the end of the input says so too, and stops the run
        print(json.dumps(what), flush=True)


def _stop_with_input() -> None:
    # Not sys.stdin.read(): the lock that it holds meanwhile is one that the interpreter may want at its exit.
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
