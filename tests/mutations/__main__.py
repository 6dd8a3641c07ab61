"""The command: see the package's docstring."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import NoReturn

from .catalogue import load_lists
from .run import CAUGHT, Results, run
from .tree import end_all

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Exit code 1 unless every edit is caught."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations", description="Which wrong edits do the tests catch?"
    )
    parser.add_argument("--only", metavar="PATTERN", action="append", help="names to try: 'cuda/*'; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, help="lists at a time, each in a copy of its own (default 1)")
    parser.add_argument("--again", action="store_true", help="try those too that were caught before")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "attbalance-mutations",
        help="where the copies are, kept for the next time (default: %(default)s)",
    )
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "mutations.json", help="default: %(default)s")
    options = parser.parse_args()
    patterns = options.only or ["*"]
    lists = [
        replace(one, mutations=tuple(m for m in one.mutations if any(fnmatch(m.name, p) for p in patterns)))
        for one in load_lists()
    ]
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, _stopped)
    results = Results(options.results)
    if options.again:
        results.forget(mutation.name for one in lists for mutation in one.mutations)
    outcomes = run(
        lists,
        source=ROOT,
        folder=options.folder,
        results=results,
        jobs=options.jobs,
        say=partial(print, flush=True),
    )
    wrong = {name: outcome for name, outcome in outcomes.items() if outcome.verdict != CAUGHT}
    for one in lists:
        if one.mutations:
            caught = sum(mutation.name not in wrong for mutation in one.mutations)
            print(f"{one.area:28} {caught:3} of {len(one.mutations):3} caught")
    for name, outcome in wrong.items():
        print(f"{outcome.verdict:8} {name}: {outcome.said}")
    print(f"mutation check: {len(outcomes) - len(wrong)} of {len(outcomes)} caught")
    return 1 if wrong or not outcomes else 0


def _stopped(number: int, _: object) -> NoReturn:
    """The same command goes on from here: outcomes are in the file, and a copy is mended before it is used."""
    end_all()
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
