"""The results as a picture: for each case a bar for each way, the byte floor or the plain work as a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.results import Row
from benchmarks.runner import FLOOR, FRESH_FLOOR
from benchmarks.table import describe, judged

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, OTHERS, PART = "tab:blue", "lightgrey", "lightsteelblue"


def plot(groups: Sequence[Sequence[Row]], path: Path) -> None:
    """Median time of every provider that passed the gate, with the 20-80 % range; peak memory beside it if known."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: smaller, and it can be searched
    import matplotlib.pyplot as plt

    charts = [rows for group in groups if (rows := _bars(group))]
    if not charts:
        raise ValueError("no timed rows to plot")
    heights = [len(rows) + 3 for rows in charts]
    panels = 2 if any(row.peak for rows in charts for row in rows) else 1
    figure, axes = plt.subplots(
        len(charts),
        panels,
        figsize=(3 + 3.5 * panels, 0.22 * sum(heights)),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": heights, "width_ratios": [3, 2][:panels]},
    )
    for (left, *right), rows in zip(axes, charts, strict=True):
        _draw_times(left, rows)
        for axis in right:
            _draw_memory(axis, rows)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(group: Sequence[Row]) -> list[Row]:
    return [
        row for row in group if row.mode == judged(group) and row.timing and row.provider not in (FLOOR, FRESH_FLOOR)
    ]


def _draw_times(axis: Axes, rows: Sequence[Row]) -> None:
    timings = [row.timing for row in rows if row.timing]
    medians = [timing.median for timing in timings]
    spread = [
        [max(timing.median - timing.p20, 0) for timing in timings],  # of one sample they differ by rounding
        [max(timing.p80 - timing.median, 0) for timing in timings],
    ]
    _horizontal(axis, rows, medians, xerr=spread)
    axis.set_yticks(range(len(rows)), [row.provider for row in rows])
    plain = next((row.timing for row in rows if row.provider == "plain"), None)
    line = (rows[0].limit, "byte floor") if plain is None else (plain.median, "plain")
    if line[0] is not None:
        axis.axvline(line[0], color="tab:red", linestyle="--", linewidth=1, label=line[1])
        axis.legend(loc="lower right", frameon=False, fontsize="x-small")
    where = rows[0].environment
    machine = where.get("gpu") or f"{where['cpu']}, {where['threads']} threads"
    machine += ", caches warm" if where["cache"] == "warm" else ""
    axis.set_title(f"{rows[0].suite}: {describe(rows[0].case)}; {machine}", fontsize="x-small", loc="left")
    axis.set_xlabel("step, ms" if rows[0].mode == "step" else f"{_mode(rows[0].mode)}, ms", fontsize="x-small")


def _draw_memory(axis: Axes, rows: Sequence[Row]) -> None:
    if all(row.peak is None for row in rows):
        axis.set_axis_off()
        return
    _horizontal(axis, rows, [None if row.peak is None else row.peak / 1e6 for row in rows])
    axis.set_yticks([])
    axis.set_xlabel("peak memory, MB", fontsize="x-small")


def _horizontal(axis: Axes, rows: Sequence[Row], values: Sequence[float | None], **options: Any) -> None:
    """No bar where a value is not known."""
    colours = [OURS if row.provider.startswith("ours") else PART if row.part else OTHERS for row in rows]
    lengths = [0 if value is None else value for value in values]
    bars = axis.barh(range(len(rows)), lengths, color=colours, error_kw={"linewidth": 1}, **options)
    axis.bar_label(bars, ["" if value is None else _label(value) for value in values], padding=4, size=7)
    axis.invert_yaxis()
    axis.margins(x=0.18)
    axis.tick_params(labelsize="x-small")
    axis.spines[["top", "right"]].set_visible(False)


def _label(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _mode(mode: str) -> str:
    return "forward + backward" if mode == "both" else mode
