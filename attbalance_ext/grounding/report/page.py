"""Puts the report together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.evaluate import evaluate
from attbalance_ext.grounding.experiment.findings import Findings
from attbalance_ext.grounding.files import write_text
from attbalance_ext.grounding.report.charts import NARROW, Line, line_chart
from attbalance_ext.grounding.report.pictures import picture_groups
from attbalance_ext.grounding.report.studies import data_uri, study_page
from attbalance_ext.grounding.report.summary import Summary, settings_table, summarize
from attbalance_ext.grounding.runs import Run
from attbalance_ext.grounding.sources import open_split

MAX_RUNS = 6
"""The page has that many line colours."""


@dataclass(frozen=True)
class Chart:
    """A drawing and the line that says what it shows."""

    title: str
    svg: Markup


def write_report(
    runs: Sequence[Run],
    out: Path,
    *,
    versions: Mapping[str, str],
    studies: Sequence[Findings] = (),
    split: str = "test",
    cache: Path | None = None,
    per_group: int = 4,
    seed: int = 0,
) -> list[Summary]:
    """Evaluate ``runs`` on ``split`` and write the page to ``out``; gives back the rows of its table.

    Runs are compared on the same sentences, so they must share their data set. ``versions``: what the page says
    about software and machine, name to value. ``studies`` come first on the page; one of the two may be empty.
    """
    if not runs and not studies:
        raise UserError("a report needs a run or a study")
    if len(runs) > MAX_RUNS:
        raise UserError(f"a report shows at most {MAX_RUNS} runs, got {len(runs)}")
    if any(_data_of(run) != _data_of(runs[0]) for run in runs):
        raise UserError(
            "the runs of one report must share their data: got "
            + ", ".join(f"{run.directory.name} on {run.settings.data} at {run.settings.size} px" for run in runs)
        )
    splits = [open_split(run.settings, split, run.tokenizer, run.model, cache=cache) for run in runs]
    evaluations = [
        evaluate(run.model, data, rule=run.settings.rule, backend=run.settings.backend)
        for run, data in zip(runs, splits, strict=True)
    ]
    summaries = [summarize(run, evaluation) for run, evaluation in zip(runs, evaluations, strict=True)]
    about_runs: dict[str, Any] = {"data": ""}
    if runs:
        about_runs = {
            "data": runs[0].settings.data,
            "split": split,
            "headline": _headline(summaries),
            "learning": _learning_charts(runs),
            "in_box": _layer_charts(runs, "in_box", "attention in the true box", (0.0, 1.0)),
            "rho": _layer_charts(runs, "rho", "rho", (-0.2, 1.0)),
            "groups": picture_groups(runs, splits, evaluations, per_group=per_group, seed=seed),
            "settings": settings_table(list(runs)),
            "versions": versions,
        }
    page = (
        _environment()
        .get_template("report.html")
        .render(
            studies=[study_page(found) for found in studies],
            summaries=summaries,
            written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            **about_runs,
        )
    )
    write_text(out, page)
    return summaries


def _data_of(run: Run) -> tuple[object, ...]:
    return run.settings.data, run.settings.data_root, run.settings.wrong_boxes, run.settings.size


def _headline(summaries: list[Summary]) -> str | None:
    """One sentence where the page compares a plain run with an AttBalance run; None otherwise."""
    if len(summaries) != 2 or summaries[0].attbalance or not summaries[1].attbalance:
        return None
    plain, full = summaries
    return (
        f"On {full.samples:,} unseen sentences, {100 * full.acc50:.1f} % are grounded at IoU 0.5 with AttBalance, and "
        f"{100 * plain.acc50:.1f} % without it: the same model, initial weights, data order and steps."
    )


def _learning_charts(runs: Sequence[Run]) -> list[Chart]:
    shade = max(run.settings.terms_steps for run in runs)
    loss = _lines(runs, "train", lambda record: record["box"])
    accuracy = _lines(runs, "validation", lambda record: record["acc50"])
    return [
        Chart("Box loss in training (L1 + GIoU)", line_chart(loss, label="box loss over steps", shade_until=shade)),
        Chart(
            "Accuracy at IoU 0.5 on validation",
            line_chart(accuracy, label="validation accuracy over steps", y_range=(0.0, 1.0), shade_until=shade),
        ),
    ]


def _layer_charts(runs: Sequence[Run], key: str, label: str, y_range: tuple[float, float]) -> list[Chart]:
    """One chart per fusion layer, one line per run."""
    shade = max(run.settings.terms_steps for run in runs)
    supervised = {layer for run in runs if run.settings.attbalance for layer in run.model.supervised}
    charts = []
    for layer in range(max(run.model.layers for run in runs)):
        lines = _lines(
            [run for run in runs if layer < run.model.layers],
            "validation",
            lambda record, layer=layer: record[key][layer],
        )
        title = f"Layer {layer + 1}{'' if layer in supervised else ', not supervised'}, n = {_sample_size(runs)}"
        svg = line_chart(lines, label=f"{label}, layer {layer + 1}", size=NARROW, y_range=y_range, shade_until=shade)
        charts.append(Chart(title, svg))
    return charts


def _sample_size(runs: Sequence[Run]) -> str:
    """Validation sentences behind a point: those whose box covers a visual token, where the history says how many."""
    points = [point for run in runs for point in run.history["validation"]]
    sizes = sorted({point.get("valid", point["samples"]) for point in points})
    return " to ".join(dict.fromkeys(f"{size:,}" for size in (sizes[:1] + sizes[-1:])))


def _lines(runs: Sequence[Run], kind: str, value: Any) -> list[Line]:
    return [
        Line(
            run.directory.name,
            index,
            [record["step"] for record in run.history[kind]],
            [value(record) for record in run.history[kind]],
        )
        for index, run in enumerate(runs)
    ]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("attbalance_ext.grounding"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    return environment
