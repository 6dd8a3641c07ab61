"""The results as a picture: one bar chart per case, the byte floor as a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import Row
from benchmarks.runner import FLOOR, FRESH_FLOOR


def plot(groups: Sequence[Sequence[Row]], path: Path) -> None:
    """Median forward + backward time of every provider that passed the gate, with the 20-80 % range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    charts = [rows for group in groups if (rows := [row for row in group if row.mode == "both" and row.timing])]
    if not charts:
        raise ValueError("no rows of mode 'both' to plot")
    figure, axes = plt.subplots(len(charts), 1, figsize=(7, 2.4 * len(charts)), squeeze=False, layout="constrained")
    for axis, rows in zip(axes[:, 0], charts, strict=True):
        bars = [(row, row.timing) for row in rows if row.timing and row.provider not in (FLOOR, FRESH_FLOOR)]
        medians = [timing.median for _, timing in bars]
        spread = [
            [timing.median - timing.p20 for _, timing in bars],
            [timing.p80 - timing.median for _, timing in bars],
        ]
        colours = ["tab:blue" if row.provider.startswith("ours") else "lightgrey" for row, _ in bars]
        drawn = axis.barh([row.provider for row, _ in bars], medians, xerr=spread, color=colours)
        axis.bar_label(drawn, [f"{median:.2f}" for median in medians], padding=3)
        axis.axvline(rows[0].floor, color="tab:red", linestyle="--", label="byte floor")
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize="small")
        case, where = rows[0].case, rows[0].environment
        axis.set_title(
            f"{rows[0].suite}: {', '.join(f'{k}={v}' for k, v in case.items())}; {where['cpu']}, "
            f"{where['threads']} threads",
            fontsize="small",
            loc="left",
        )
        axis.set_xlabel("forward + backward, ms")
    figure.savefig(path)
    plt.close(figure)
