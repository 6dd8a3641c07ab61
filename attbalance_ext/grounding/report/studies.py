"""A study for the page and for documents: tables, figures, and one sentence for each comparison."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attbalance_ext.grounding.experiment.findings import Findings, Row, machines
from attbalance_ext.grounding.experiment.statistics import Comparison, Interval
from attbalance_ext.grounding.files import write_text
from attbalance_ext.grounding.report import study_plots
from attbalance_ext.grounding.report.study_plots import Plot

SIZES = ("small", "medium", "large")


@dataclass(frozen=True)
class Table:
    """Columns and rows of text; ``marks``: a class for each row."""

    columns: list[str]
    rows: list[list[str]]
    marks: list[str]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


@dataclass(frozen=True)
class Section:
    """Everything compared on one data set with one model."""

    title: str
    results: Table
    comparisons: Table | None
    behaviour: Table
    sentences: list[str]
    plots: list[Plot]


@dataclass(frozen=True)
class StudyPage:
    title: str
    question: str
    state: str
    """How much of it has been run."""
    overview: Plot | None
    """All comparisons of a study with several sections."""
    sections: list[Section]
    settings: list[tuple[str, str]]
    """Those that all runs share."""
    machines: list[str]


def study_page(found: Findings) -> StudyPage:
    groups = found.groups
    several = len(groups) > 1
    return StudyPage(
        title=found.spec.title,
        question=found.spec.question,
        state=_state(found),
        overview=study_plots.differences(found.rows, _full_name) if several else None,
        sections=[_section(model, data, rows, several) for model, data, rows in groups],
        settings=_shared_settings(found),
        machines=machines(found.records),
    )


def markdown(found: Findings) -> str:
    """The study's tables, for a document."""
    parts = [_state(found)]
    for model, data, rows in found.groups:
        tables = (results_table(rows), comparison_table(rows), behaviour_table(rows))
        parts += [f"`{model}`, `{data}`", *(table.markdown() for table in tables if table is not None)]
    return "\n\n".join(parts)


def results_table(rows: Sequence[Row]) -> Table:
    """How good: on the split that is compared on, on the others, and by the size of the box."""
    _, *others = rows[0].records[rows[0].seeds[0]].results
    columns = ["variant", "seeds", "acc@0.5", "acc@0.7", "mean IoU", "small / medium / large"]
    columns += [f"acc@0.5 on {split}" for split in others]
    body = [
        [
            row.variant.label,
            f"{len(row.seeds)}",
            percent(row.over_seeds("acc50")),
            percent(row.over_seeds("acc70")),
            _number(row.over_seeds("miou"), 3),
            " / ".join(percent(row.over_seeds("by_size", key=size), ends=False) for size in SIZES),
            *(percent(row.over_seeds("acc50", split)) for split in others),
        ]
        for row in rows
    ]
    return Table(columns, body, ["" for _ in rows])


def comparison_table(rows: Sequence[Row]) -> Table | None:
    """What was compared in acc@0.5, seed by seed; None where nothing was."""
    body, marks = [], []
    for row in rows:
        for name, found in row.comparisons.items():
            cells = [row.variant.label, _label(rows, name), _difference(found), f"{found.difference.n}", _p(found)]
            body.append(cells)
            marks.append(found.verdict)
    return Table(["variant", "against", "difference in acc@0.5", "seeds", "p"], body, marks) if body else None


def behaviour_table(rows: Sequence[Row]) -> Table:
    """Why: attention, rho, difficulty weights, time. Attention and rho are the last layer's."""
    columns = [
        "variant",
        "in-box attention",
        "the same, as used",
        "rho",
        "W_adw",
        "W_odw",
        "product",
        "ms a step",
        "s",
    ]
    body = [
        [
            row.variant.label,
            *(_number(row.over_seeds(name, key=-1), 2) for name in ("in_box", "used_in_box", "rho")),
            *(_number(row.of_training(name), 2) for name in ("adw", "odw", "dat")),
            _number(row.step_ms, 0, ends=False),
            _number(row.seconds, 0, ends=False),
        ]
        for row in rows
    ]
    return Table(columns, body, ["" for _ in rows])


def percent(found: Interval | None, *, ends: bool = True) -> str:
    if found is None:
        return ""
    return _number(Interval(100 * found.mean, 100 * found.low, 100 * found.high, found.n), 1, ends=ends)


def _number(found: Interval | None, digits: int, *, ends: bool = True) -> str:
    """``mean ± half of the 95 % interval``."""
    if found is None or not math.isfinite(found.mean):
        return ""
    half = f" ± {(found.high - found.low) / 2:.{digits}f}" if ends and found.n > 1 else ""
    return f"{found.mean:.{digits}f}{half}"


def _difference(comparison: Comparison) -> str:
    found = comparison.difference
    if found.n < 2:
        return f"{100 * found.mean:+.1f}"
    return f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def _p(comparison: Comparison) -> str:
    if not math.isfinite(comparison.adjusted_p):
        return ""
    return "< 0.001" if comparison.adjusted_p < 0.001 else f"{comparison.adjusted_p:.3f}"


def _label(rows: Sequence[Row], name: str) -> str:
    """What tables call a variant that is compared with: its records are there, or nothing would be compared."""
    return next(row.variant.label for row in rows if row.variant.name == name)


def _section(model: str, data: str, rows: list[Row], several: bool) -> Section:
    plots = [study_plots.curves(rows), study_plots.attention(rows), study_plots.rho(rows)]
    forest = study_plots.differences(rows, _short_name) if len(rows) > 2 else None
    return Section(
        title=f"{model} on {data}",
        results=results_table(rows),
        comparisons=comparison_table(rows),
        behaviour=behaviour_table(rows),
        sentences=_sentences(rows),
        plots=[forest, *plots] if forest is not None and not several else plots,
    )


def _sentences(rows: Sequence[Row]) -> list[str]:
    """Where a comparison found no gain: that it did not, and what attention, rho and the weights did."""
    sentences = []
    for row in rows:
        for name, found in row.comparisons.items():
            against = next(r for r in rows if r.variant.name == name)
            who = f"{row.variant.label} against {against.variant.label}: {_difference(found)} points"
            if found.difference.n < 2:
                sentences.append(f"{who}, of one seed; nothing can be said yet.")
            elif found.verdict != "helps":
                p = _p(found)
                test = f", p {p if p.startswith('<') else f'= {p}'}" if p else ""
                verdict = "worse" if found.verdict == "hurts" else "not told apart"
                sentences.append(f"{who}{test}: {verdict}. {_why(row, against)}")
    return sentences


def _why(row: Row, against: Row) -> str:
    def last(name: str) -> str:
        return f"{against.over_seeds(name, key=-1).mean:.2f} to {row.over_seeds(name, key=-1).mean:.2f}"

    parts = [
        f"In the last layer attention in the box goes from {last('in_box')} (as used: {last('used_in_box')})",
        f"rho from {last('rho')}",
    ]
    weight = row.of_training("dat")
    if weight is not None:
        parts.append(f"the box loss was weighted by {weight.mean:.2f} on average")
    return "; ".join(parts) + "."


def _state(found: Findings) -> str:
    cells = len(found.spec.cells)
    done = cells - found.missing
    splits = ", ".join(found.spec.splits)
    return (
        f"{done} of {cells} cells have been run, {len(found.records)} training runs; evaluated on {splits}. "
        "± and intervals: 95 % over training seeds (Student's t); the test sentences are the same for all. p: paired "
        "t-test over seeds, adjusted for the study's comparisons (Benjamini and Hochberg)."
    )


def _short_name(row: Row, against: Row) -> str:
    return f"{row.variant.label}  −  {against.variant.label}"


def _full_name(row: Row, against: Row) -> str:
    return f"{row.model}, {row.data.removeprefix('builtin:')}: {_short_name(row, against)}"


def _shared_settings(found: Findings) -> list[tuple[str, str]]:
    tables = [_flat(record.settings) for record in found.records]
    first = tables[0]
    return [(name, str(value)) for name, value in first.items() if all(t.get(name) == value for t in tables)]


def _flat(settings: dict[str, object]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": item for key, item in value.items()})
        else:
            flat[name] = value
    return flat


def write_figures(found: Findings, folder: Path) -> list[Path]:
    """The study's figures as files, named after study, model, data and what they show."""
    page, written = study_page(found), []
    titled = [("", page.overview)] if page.overview else []
    for section, (model, data, _) in zip(page.sections, found.groups, strict=True):
        titled += [(f"-{model}-{data.removeprefix('builtin:')}", plot) for plot in section.plots]
    for where, plot in titled:
        name = f"{found.spec.name}{where}-{plot.title.lower().replace(' ', '-').strip('?')}.svg"
        write_text(folder / name, plot.svg)
        written.append(folder / name)
    return written


def data_uri(svg: str) -> str:
    """An SVG as the address of an image: its names and styles stay its own."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
