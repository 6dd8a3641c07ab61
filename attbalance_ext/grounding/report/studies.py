"""A study for the page and for documents: tables, figures, and one sentence for each comparison."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attbalance_ext.grounding.experiment.findings import Findings, Row, machines
from attbalance_ext.grounding.experiment.statistics import Interval
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
        parts += [f"`{model}`, `{data}`", results_table(rows).markdown(), behaviour_table(rows).markdown()]
    return "\n\n".join(parts)


def results_table(rows: Sequence[Row]) -> Table:
    """How good: on the split that is compared on, on the others, and by the size of the box."""
    _, *others = rows[0].records[rows[0].seeds[0]].results
    columns = ["variant", "seeds", "acc@0.5", "difference", "p", "acc@0.7", "mean IoU", "small / medium / large"]
    columns += [f"acc@0.5 on {split}" for split in others]
    body = [
        [
            row.variant.label,
            f"{len(row.seeds)}",
            percent(row.over_seeds("acc50")),
            _difference(row),
            _p(row),
            percent(row.over_seeds("acc70")),
            _number(row.over_seeds("miou"), 3),
            " / ".join(percent(row.over_seeds("by_size", key=size), ends=False) for size in SIZES),
            *(percent(row.over_seeds("acc50", split)) for split in others),
        ]
        for row in rows
    ]
    return Table(columns, body, [row.verdict for row in rows])


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


def _difference(row: Row) -> str:
    if row.comparison is None:
        return ""
    found = row.comparison.difference
    if found.n < 2:
        return f"{100 * found.mean:+.1f}"
    return f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def _p(row: Row) -> str:
    if not math.isfinite(row.adjusted_p):
        return ""
    return "< 0.001" if row.adjusted_p < 0.001 else f"{row.adjusted_p:.3f}"


def _p_is(row: Row) -> str:
    text = _p(row)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def _section(model: str, data: str, rows: list[Row], several: bool) -> Section:
    plots = [study_plots.curves(rows), study_plots.attention(rows), study_plots.rho(rows)]
    forest = study_plots.differences(rows, lambda row: row.variant.label) if len(rows) > 2 else None
    return Section(
        title=f"{model} on {data}",
        results=results_table(rows),
        behaviour=behaviour_table(rows),
        sentences=[sentence for row in rows if (sentence := _sentence(row, rows))],
        plots=[forest, *plots] if forest is not None and not several else plots,
    )


def _sentence(row: Row, rows: Sequence[Row]) -> str | None:
    """What a comparison found, and where it found no gain, what attention, rho and the weights did."""
    if row.comparison is None:
        return None
    against = next((r for r in rows if r.variant.name == row.variant.against), None)
    other = against.variant.label if against else row.variant.against
    found = row.comparison.difference
    points = f"{100 * abs(found.mean):.1f} points"
    if found.n < 2:
        direction = "more" if found.mean > 0 else "less"
        return f"{row.variant.label}: {points} {direction} than {other} with one seed; nothing can be said yet."
    ends = f"95 % interval {100 * found.low:+.1f} to {100 * found.high:+.1f}, {found.n} seeds"
    if row.verdict == "helps":
        return f"{row.variant.label}: {points} better than {other} ({ends}, {_p_is(row)})."
    why = _why(row, against) if against else ""
    if row.verdict == "hurts":
        return f"{row.variant.label}: {points} worse than {other} ({ends}, {_p_is(row)}). {why}"
    p = f", {_p_is(row)}" if _p(row) else ""
    return f"{row.variant.label}: not told apart from {other} ({ends}{p}). {why}"


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


def _full_name(row: Row) -> str:
    return f"{row.model}, {row.data.removeprefix('builtin:')}: {row.variant.label}"


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
