"""Rho by layer as a picture: a panel for each set, a line for each model, with intervals and sample sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.files import replace_file
from attbalance_ext.grounding.rho import CONFIDENCE, LayerRho, RunRho

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's, which the colour-blind can tell apart, without the yellow, which paper swallows."""
MARKERS = ("o", "s", "^", "D", "v", "P")
"""For print without colours. Of another number than the colours: 42 models differ."""
_COLUMNS = 2
_PANEL = 3.7, 2.6
"""Inches of a panel, without the lines of its key."""
_LINE = 0.15
"""Inches of a line of a key."""
_NAME = 40
"""Characters of a name that a panel has room for; the end of a path says more than its start."""


def require_matplotlib() -> None:
    """Refuse before any time is spent."""
    try:
        import_module("matplotlib")
    except ModuleNotFoundError as error:
        raise UserError(f"the picture needs {error.name!r}: pip install 'attbalance_ext[train]'") from None


def write_plot(results: Sequence[RunRho], path: Path, *, resamples: int) -> None:
    """Write the picture as SVG. Its text stays text: smaller, and it can be searched. Same results, same bytes."""
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "attbalance"}):
        figure = draw(results, resamples=resamples)
        replace_file(path, lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))


def draw(results: Sequence[RunRho], *, resamples: int) -> Figure:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(result.name for result in results))
    sets = list(dict.fromkeys((result.data, result.split) for result in results))
    panels = [[result for result in results if (result.data, result.split) == which] for which in sets]
    columns = min(len(panels), _COLUMNS)
    rows = math.ceil(len(panels) / columns)
    lines = max(sum(len(_key(result)) for result in panel) for panel in panels)
    figure = Figure(
        figsize=(columns * _PANEL[0] + 0.6, rows * (_PANEL[1] + lines * _LINE) + 0.4), dpi=110, layout="constrained"
    )
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, panel, [names.index(result.name) for result in panel])
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    axes[0].set_ylim(*_limits([layer for result in results for layer in result.layers]))
    for axis in axes[::columns]:
        axis.set_ylabel("Spearman's rho\nof in-box attention and IoU", fontsize=8.5)
    notes = (
        "filled: supervised layer, open: not",
        f"bars: {100 * CONFIDENCE:.0f} % bootstrap intervals, {resamples:,} resamples",
    )
    figure.supxlabel((";\n" if columns == 1 else "; ").join(notes), fontsize=7.5, color="0.35")
    return figure


def _draw_panel(axis: Axes, panel: Sequence[RunRho], styles: Sequence[int]) -> None:
    axis.axhline(0, color="0.4", linewidth=0.8, zorder=1)
    axis.grid(axis="y", color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)
    signs: list[Line2D] = []
    step = min(0.14, 0.6 / len(panel))
    for place, (result, style) in enumerate(zip(panel, styles, strict=True)):
        colour, marker = COLOURS[style % len(COLOURS)], MARKERS[style % len(MARKERS)]
        shift = step * (place - (len(panel) - 1) / 2)
        x = [layer.layer + shift for layer in result.layers]
        y = [math.nan if layer.rho is None else layer.rho for layer in result.layers]
        axis.plot(x, y, color=colour, linewidth=1, alpha=0.35, zorder=2)
        for at, rho, layer in zip(x, y, result.layers, strict=True):
            if layer.low is not None and layer.high is not None:
                axis.vlines(at, layer.low, layer.high, color=colour, linewidth=1.5, zorder=3)
            face = colour if layer.supervised else "white"
            axis.plot(at, rho, marker, color=colour, markerfacecolor=face, markersize=5, zorder=4)
        signs += axis.plot([], [], marker, color=colour, markersize=5)
        for _ in _key(result)[1:]:
            signs += axis.plot([], [], " ")
    lines = [line for result in panel for line in _key(result)]
    title = f"{panel[0].data} {panel[0].split}"
    axis.set_title(title, loc="left", fontsize=9.5, pad=6 + 72 * _LINE * len(lines), parse_math=False)
    key = axis.legend(
        signs,
        [" "] * len(lines),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        frameon=False,
        fontsize=8,
        borderpad=0.2,
        borderaxespad=0.1,
        labelspacing=0.3,
        handlelength=1,
        handletextpad=0.4,
    )
    for text, line in zip(key.get_texts(), lines, strict=True):
        text.set(text=line, parse_math=False)  # as a label, a name with "_" in front would be left out
    key.set_in_layout(False)  # the title makes room for it; a long name is not to make the panel narrow
    axis.set_xticks(range(1, max(len(result.layers) for result in panel) + 1))
    axis.margins(x=0.08)
    axis.set_xlabel("fusion layer", fontsize=8.5)
    axis.tick_params(labelsize=8, labelleft=True)
    axis.spines[["top", "right"]].set_visible(False)


def _key(result: RunRho) -> list[str]:
    """Lines: the name with the sample size of every point, and which points there are not."""
    name = result.name if len(result.name) <= _NAME else f"…{result.name[1 - _NAME :]}"
    sizes: dict[int, list[str]] = {}
    for layer in result.layers:
        sizes.setdefault(layer.n, []).append(f"{layer.layer}")
    if len(sizes) == 1:
        lines = [f"{name}, n = {result.layers[0].n:,}"]
    else:
        lines = [name, *(f"n = {size:,} in layer {', '.join(layers)}" for size, layers in sizes.items())]
    undefined = [f"{layer.layer}" for layer in result.layers if layer.rho is None]
    if undefined:
        lines.append(f"rho undefined in layer {', '.join(undefined)}")
    return lines


def _limits(layers: Sequence[LayerRho]) -> tuple[float, float]:
    """0 and everything drawn, with a margin."""
    drawn = [value for layer in layers for value in (layer.rho, layer.low, layer.high) if value is not None]
    low, high = min([0.0, *drawn]), max([0.2, *drawn])
    margin = 0.04 * (high - low)
    return low - margin, high + margin
