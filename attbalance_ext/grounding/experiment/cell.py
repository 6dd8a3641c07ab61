"""One cell of a study: train it, from where it was left, evaluate it, write its record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from attbalance_ext.grounding.data.generate import content_version
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.evaluate import evaluate
from attbalance_ext.grounding.experiment.record import ELSEWHERE, Record, write_record
from attbalance_ext.grounding.files import load_checkpoint
from attbalance_ext.grounding.fit import fit
from attbalance_ext.grounding.provenance import commit
from attbalance_ext.grounding.runs import load_run, resume_run, start_run
from attbalance_ext.grounding.settings import Settings
from attbalance_ext.grounding.sources import open_pictures, open_split
from attbalance_ext.grounding.train import BEST, LAST, PREVIOUS, Trainer


def run_cell(
    settings: Settings,
    directory: Path,
    record: Path,
    *,
    splits: Sequence[str],
    machine: Mapping[str, str],
    cache: Path | None = None,
    after_step: Callable[[Trainer], object] = lambda trainer: None,
) -> None:
    """Train a run of ``settings`` in ``directory``, evaluate it on ``splits`` and write ``record``.

    What is in ``directory`` is continued, and only evaluated where it is finished. ``machine``: versions and hardware,
    for the record.

    Raises:
        UserError: a run of other settings lies there, or data that are needed are not there.
        Interrupted: Ctrl-C or SIGTERM; the run goes on from its checkpoint another time.
    """
    for split in splits:  # what is missing is missed before the training and not after it
        open_pictures(settings, split, cache=cache)
    trainer = _trainer(settings, directory, cache)
    fit({directory.name: trainer}, show=False, after_step=lambda: after_step(trainer))
    write_record(record, _record(directory, settings, splits, machine, cache))


def _trainer(settings: Settings, directory: Path, cache: Path | None) -> Trainer:
    last = directory / LAST
    if not last.exists():
        if not (directory / PREVIOUS).exists():  # it was ended before its first checkpoint: nothing goes on from there
            (directory / BEST).unlink(missing_ok=True)
        return start_run(settings, directory, cache=cache)
    there = Settings.from_dict(load_checkpoint(last).get("settings", {}))
    # A run that was told its epochs counts in steps once it has begun.
    left_out = {*ELSEWHERE, *(("epochs", "steps") if settings.epochs is not None else ())}
    wanted, found = (
        {name: value for name, value in each.to_dict().items() if name not in left_out} for each in (settings, there)
    )
    if found != wanted:
        raise UserError(f"{directory} holds a run of other settings; remove it, or choose another --runs")
    return resume_run(directory, cache=cache, device=settings.device)


def _record(
    directory: Path, settings: Settings, splits: Sequence[str], machine: Mapping[str, str], cache: Path | None
) -> Record:
    run = load_run(directory / LAST, device=settings.device)
    results = {}
    for split in splits:
        data = open_split(run.settings, split, run.tokenizer, run.model, cache=cache)
        found = evaluate(run.model, data, rule=settings.rule, backend=settings.backend)
        results[split] = {**found.metrics(), "by_size": found.accuracy_by_size()}
    windows = run.history["train"]
    with_terms = [window for window in windows if "attention" in window]
    without = [window for window in windows if "attention" not in window]
    revision, modified = commit("experiments")
    return Record(
        settings=settings.to_dict(),
        results=results,
        curve=_curve(run.history),
        training=_training(with_terms),
        seconds=_seconds(windows)[-1],
        step_ms=median(window["step_ms"] for window in with_terms or without),
        plain_step_ms=median(window["step_ms"] for window in without) if with_terms and without else None,
        machine=dict(machine),
        data_version=content_version() if settings.data_root is None else None,
        commit=revision,
        modified=modified,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    )


def _curve(history: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    windows = list(zip(history["train"], _seconds(history["train"]), strict=True))

    def gone(step: int) -> float:
        """A window of the training log may end after the validation: the last one before it says the time."""
        return max((seconds for window, seconds in windows if window["step"] <= step), default=0.0)

    names = ("step", "acc50", "acc70", "miou", "in_box", "rho")
    return [{**{n: point[n] for n in names}, "seconds": gone(point["step"])} for point in history["validation"]]


def _seconds(windows: Sequence[dict[str, Any]]) -> list[float]:
    """Training time until the end of each window of the log: its steps times their median."""
    total, before, sums = 0.0, 0, []
    for window in windows:
        total += (window["step"] - before) * window["step_ms"] / 1000
        before = window["step"]
        sums.append(total)
    return sums


def _training(windows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if not windows:
        return {}

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    return {
        "adw": mean([window["adw"] for window in windows]),
        "odw": mean([window["odw"] for window in windows]),
        "dat": mean([window["adw"] * window["odw"] for window in windows]),
        "rac": mean([window["rac"] for window in windows]),
        "mrc": mean([window["mrc"] for window in windows]),
        "rho": [mean(list(layer)) for layer in zip(*(window["rho"] for window in windows), strict=True)],
    }
