"""The figures of a run: one row of the table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

from attbalance_ext.grounding.evaluate import Evaluation
from attbalance_ext.grounding.runs import Run


@dataclass(frozen=True)
class Summary:
    """What a reader compares between runs. Times are medians over the run's own training steps."""

    name: str
    attbalance: bool
    step: int
    """Of the checkpoint that was evaluated."""
    samples: int
    acc50: float
    acc50_error: float
    """Binomial standard error of ``acc50``: the noise of this test set, not of training."""
    acc70: float
    miou: float
    in_box: list[float]
    """Mean attention in the true box, per fusion layer."""
    rho: list[float]
    """Spearman's rho between in-box attention and IoU over the test set, per fusion layer."""
    step_ms: float
    """With the terms on where the run has them, else of every step."""
    plain_step_ms: float | None
    """Of the steps after the terms were switched off; None for a run without such steps."""


def summarize(run: Run, evaluation: Evaluation) -> Summary:
    metrics = evaluation.metrics()
    records = run.history["train"]
    supervised = [record["step_ms"] for record in records if "attention" in record]
    plain = [record["step_ms"] for record in records if "attention" not in record]
    return Summary(
        name=run.directory.name,
        attbalance=run.settings.attbalance,
        step=run.step,
        samples=metrics["samples"],
        acc50=metrics["acc50"],
        acc50_error=math.sqrt(metrics["acc50"] * (1 - metrics["acc50"]) / metrics["samples"]),
        acc70=metrics["acc70"],
        miou=metrics["miou"],
        in_box=metrics["in_box"],
        rho=metrics["rho"],
        step_ms=_median(supervised or plain),
        plain_step_ms=_median(plain) if supervised and plain else None,
    )


def settings_table(runs: list[Run]) -> list[tuple[str, list[str], bool]]:
    """(setting, its value in every run, whether the runs differ), those that differ first."""
    flat = [_flatten(run.settings.to_dict()) for run in runs]
    rows = []
    for name in flat[0]:
        values = [str(settings.get(name, "")) for settings in flat]
        rows.append((name, values, len(set(values)) > 1))
    return sorted(rows, key=lambda row: not row[2])


def _flatten(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = round(value, 6) if isinstance(value, float) else value
    return flat


def _median(values: list[float]) -> float:
    return median(values) if values else math.nan
