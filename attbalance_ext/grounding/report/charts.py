"""Line charts as inline SVG, coloured by the page's own style sheet so that they follow its light and dark themes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

WIDE, NARROW = (440, 230), (260, 190)
"""(width, height) in units that are near a pixel where the page puts the chart: text keeps its size."""
LEFT, RIGHT, TOP, BOTTOM = 36, 18, 10, 34
MAX_POINTS = 80
"""More points than this are averaged in groups: a line is about 300 pixels wide."""


@dataclass(frozen=True)
class Line:
    """One run's line: ``index`` picks its colour."""

    name: str
    index: int
    x: Sequence[float]
    y: Sequence[float]


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    size: tuple[int, int] = WIDE,
    y_range: tuple[float, float] | None = None,
    shade_until: float | None = None,
) -> Markup:
    """An SVG of ``lines`` over training steps.

    ``label`` describes the chart to a screen reader; ``size`` is :data:`WIDE` or :data:`NARROW`; ``y_range`` fixes
    the vertical axis; ``shade_until`` marks the first part of the steps (where the attention terms are on).
    """
    width, height = size
    lines = [_thinned(line) for line in lines if len(line.x)]
    if not lines:
        return Markup('<p class="empty">no records</p>')
    x_high = max(max(line.x) for line in lines)
    values = [value for line in lines for value in line.y if math.isfinite(value)]
    low, high = y_range or (min([*values, 0.0]), max([*values, 1e-9]) * 1.05)
    x_ticks, y_ticks = _ticks(0.0, x_high, 4), _ticks(low, high, 4)

    def across(x: float) -> float:
        return LEFT + (width - LEFT - RIGHT) * x / (x_high or 1.0)

    def up(y: float) -> float:
        return height - BOTTOM - (height - TOP - BOTTOM) * (y - low) / (high - low)

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">']
    if shade_until:
        phase = across(min(shade_until, x_high)) - LEFT
        parts.append(f'<rect class="phase" x="{LEFT}" y="{TOP}" width="{phase:.1f}" height="{height - TOP - BOTTOM}"/>')
    for tick in y_ticks:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
            f'<text class="tick" x="{LEFT - 6}" y="{up(tick) + 3.5:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in x_ticks:
        parts.append(
            f'<text class="tick" x="{across(tick):.1f}" y="{height - BOTTOM + 15}" text-anchor="middle">{tick:g}</text>'
        )
    parts.append(
        f'<text class="axis" x="{(LEFT + width - RIGHT) / 2}" y="{height - 3}" text-anchor="middle">step</text>'
    )
    for line in lines:
        points = [(across(x), up(y)) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline class="line run{line.index}" points="{path}"><title>{escape(line.name)}</title></polyline>'
        )
        if points:
            x, y = points[-1]
            parts.append(
                f'<circle class="dot run{line.index}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                f"<title>{escape(line.name)}: {line.y[-1]:.3g} at step {line.x[-1]:g}</title></circle>"
            )
    return Markup("".join([*parts, "</svg>"]))  # noqa: S704 - texts are escaped, the rest are numbers


def _thinned(line: Line) -> Line:
    size = math.ceil(len(line.x) / MAX_POINTS)
    groups = range(0, len(line.x), size)
    return Line(
        line.name,
        line.index,
        [_mean(line.x[start : start + size]) for start in groups],
        [_mean(line.y[start : start + size]) for start in groups],
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers in [low, high]."""
    span = (high - low) or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / count))
    step = min((size * magnitude for size in (1, 2, 2.5, 5, 10)), key=lambda size: abs(span / size - count))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]
