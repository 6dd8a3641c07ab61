"""The demonstration: one model trained twice, without and with AttBalance, everything else equal."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.files import load_checkpoint, write_text
from attbalance_ext.grounding.fit import fit
from attbalance_ext.grounding.report import write_report
from attbalance_ext.grounding.report.summary import Summary
from attbalance_ext.grounding.runs import load_run, refuse_existing, resume_run, start_run, take_folder
from attbalance_ext.grounding.settings import Settings
from attbalance_ext.grounding.train import LAST, Trainer

PLAIN, FULL = "plain", "attbalance"
MARKER = ".demo"


def run_demo(settings: Settings, out: Path, *, versions: Mapping[str, str], cache: Path | None = None) -> list[Summary]:
    """Train both runs in turns, evaluate them on the test split and write ``out``/report.html.

    The runs share initial weights, frozen image features, data order and number of steps. An unfinished demo of the
    same settings in ``out`` is continued; a finished or different one is replaced. Runs that are not a demo's are left
    alone: :class:`UserError`.
    """
    trainers = _trainers(
        {PLAIN: replace(settings, attbalance=False), FULL: replace(settings, attbalance=True)}, out, cache
    )
    fit(trainers)
    return write_report(
        [load_run(out / name) for name in trainers], out / "report.html", versions=versions, cache=cache
    )


def _trainers(runs: dict[str, Settings], out: Path, cache: Path | None) -> dict[str, Trainer]:
    marker = out / MARKER
    if marker.exists() and all(_unfinished(out / name, settings) for name, settings in runs.items()):
        return {name: resume_run(out / name, cache=cache) for name in runs}
    for name in runs:
        if marker.exists():
            with take_folder(out / name):
                shutil.rmtree(out / name, ignore_errors=True)
        refuse_existing(out / name)
    trainers: dict[str, Trainer] = {}
    for name, settings in runs.items():
        trainers[name] = start_run(settings, out / name, cache=cache, like=next(iter(trainers.values()), None))
    write_text(marker, "The runs beside this file are a demo's: 'attbalance demo' replaces them.\n")
    return trainers


def _unfinished(directory: Path, settings: Settings) -> bool:
    try:
        state = load_checkpoint(directory / LAST)
    except UserError:  # none, or one that another version wrote
        return False
    return state["settings"] == settings.to_dict() and state["step"] < settings.steps
