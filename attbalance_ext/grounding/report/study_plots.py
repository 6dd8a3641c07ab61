"""Figures of a study, by matplotlib: SVG whose text stays text, on white, for the page and for documents."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.experiment.findings import Row
from attbalance_ext.grounding.experiment.statistics import Interval, interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a7a00", "#000000", "#7f7f7f")
"""Okabe and Ito's, which people who do not see all colours can tell apart, and two more."""
MARKS = "osD^vP*Xh"
MOST_BANDS = 4
"""More variants than this are drawn without the spread of their seeds."""
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "attbalance",  # the same figure is the same bytes
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e4e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Plot:
    """A figure and what it shows."""

    title: str
    note: str
    svg: str
    """The file's text."""


def differences(rows: Sequence[Row], name: Callable[[Row, Row], str]) -> Plot | None:
    """Every comparison in accuracy, in points; None where nothing is compared. ``name``: of a row and another."""
    compared = [
        (name(row, against), comparison)
        for row in rows
        for other, comparison in row.comparisons.items()
        for against in rows
        if (against.model, against.data, against.variant.name) == (row.model, row.data, other)
    ]
    if not compared:
        return None
    figure, (axes,) = _figure(1, width=8.4, height=0.8 + 0.3 * len(compared))
    for place, (_, comparison) in enumerate(reversed(compared)):
        colour = {"helps": "#0072b2", "hurts": "#d55e00"}.get(comparison.verdict, "#7f7f7f")
        found = _scaled(comparison.difference)
        _point(axes, found.mean, place, found, colour, "o", horizontal=True)
    axes.axvline(0, color="#1c2024", linewidth=0.8)
    labels = [f"{label} (n = {comparison.difference.n})" for label, comparison in reversed(compared)]
    axes.set_yticks(range(len(compared)), labels)
    axes.grid(axis="y", visible=False)
    axes.set_ylim(-0.6, len(compared) - 0.4)
    axes.set_xlabel("difference in acc@0.5, points")
    return Plot(
        "Differences",
        "Mean over n training seeds with its 95 % interval. Blue: better, orange: worse, grey: not told apart at 5 %, "
        "adjusted for the study's number of comparisons.",
        _svg(figure),
    )


def curves(rows: Sequence[Row]) -> Plot:
    """Validation accuracy over steps, and over training time."""
    figure, panels = _figure(2, width=8.4, height=3.2, sharey=True)
    banded = len(rows) <= MOST_BANDS
    for axes, x, label in zip(panels, ("step", "seconds"), ("step", "seconds of training"), strict=True):
        for index, row in enumerate(rows):
            points = list(zip(*(record.curve for record in row.records.values()), strict=True))
            at = [interval([point[x] for point in seeds]).mean for seeds in points]
            accuracy = [[100 * point["acc50"] for point in seeds] for seeds in points]
            mean = [interval(values).mean for values in accuracy]
            colour = COLOURS[index % len(COLOURS)]
            axes.plot(at, mean, color=colour, marker=MARKS[index % len(MARKS)], markersize=3.5, linewidth=1.4)
            if banded:
                axes.fill_between(
                    at, list(map(min, accuracy)), list(map(max, accuracy)), color=colour, alpha=0.13, lw=0
                )
        axes.set_xlabel(label)
    panels[0].set_ylabel("acc@0.5 on validation, %")
    _legend(figure, rows)
    return Plot(
        "Learning",
        f"Mean over seeds{'; band: from the worst to the best seed' if banded else ''}. Times are of training alone.",
        _svg(figure),
    )


def attention(rows: Sequence[Row]) -> Plot:
    """Attention in the true box by layer: the supervised map, and what the network itself uses."""
    titles = ("the supervised map", "attention the network uses")
    figure, panels = _figure(2, width=8.4, height=3.0, sharey=True)
    for axes, name, title in zip(panels, ("in_box", "used_in_box"), titles, strict=True):
        _by_layer(axes, rows, name)
        axes.set_title(title, fontsize=9)
    panels[0].set_ylabel("part inside the true box")
    panels[0].set_ylim(0, 1)
    _legend(figure, rows)
    return Plot(
        "Where the object query looks",
        "Mean over the test sentences, then over seeds, with 95 % intervals over seeds. Left: the map that RAC and MRC "
        "supervise. Right: the softmax that the network's own attention is, heads averaged, words included.",
        _svg(figure),
    )


def rho(rows: Sequence[Row]) -> Plot:
    """Spearman's rho between in-box attention and IoU by layer."""
    figure, (axes,) = _figure(1, width=8.4, height=3.0)
    _by_layer(axes, rows, "rho")
    axes.axhline(0, color="#1c2024", linewidth=0.8)
    axes.set_ylabel("Spearman's rho")
    seeds = sorted({len(row.seeds) for row in rows})
    counts = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    size = f"each rho over {rows[0].samples:,} sentences, {counts} seed{'' if seeds == [1] else 's'} a point"
    axes.set_title(size, fontsize=9)
    _legend(figure, rows)
    return Plot(
        "Does looking help?",
        f"Rank correlation between attention in the box and IoU: {size}; 95 % intervals over seeds.",
        _svg(figure),
    )


def _by_layer(axes: Axes, rows: Sequence[Row], name: str) -> None:
    spread = 0.7 / max(len(rows), 1)
    for index, row in enumerate(rows):
        for layer in range(row.layers):
            found = row.over_seeds(name, key=layer)
            place = layer + 1 + (index - (len(rows) - 1) / 2) * spread
            colour, mark = COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)]
            _point(axes, place, found.mean, found, colour, mark, horizontal=False)
    layers = max(row.layers for row in rows)
    axes.set_xticks(range(1, layers + 1))
    axes.set_xlim(0.5, layers + 0.5)
    axes.set_xlabel("layer")
    axes.grid(axis="x", visible=False)


def _point(axes: Axes, x: float, y: float, found: Interval, colour: str, mark: str, *, horizontal: bool) -> None:
    """A mean and, where there is one, its interval."""
    error = None
    if found.n > 1:
        error = [[found.mean - found.low], [found.high - found.mean]]
    bars: dict[str, Any] = {"xerr" if horizontal else "yerr": error}
    axes.errorbar([x], [y], **bars, fmt=mark, color=colour, markersize=4.5, capsize=2.5, elinewidth=1.3)


def _scaled(found: Interval) -> Interval:
    return Interval(100 * found.mean, 100 * found.low, 100 * found.high, found.n)


def _figure(panels: int, *, width: float, height: float, sharey: bool = False) -> tuple[Figure, Sequence[Axes]]:
    """A figure of its own: matplotlib's global state is the caller's."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UserError("plots need matplotlib: pip install 'attbalance_ext[train]'") from None
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(1, panels, sharey=sharey, squeeze=False)[0]
    return figure, list(axes)


def _legend(figure: Figure, rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D

    if len(rows) < 2:
        return
    entries = [
        Line2D(
            [], [], color=COLOURS[i % len(COLOURS)], marker=MARKS[i % len(MARKS)], markersize=4.5, label=r.variant.label
        )
        for i, r in enumerate(rows)
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=min(len(rows), 3), frameon=False, fontsize=8)


def _svg(figure: Figure) -> str:
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
