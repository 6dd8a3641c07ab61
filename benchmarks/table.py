"""The results as tables for the terminal: small, and with the bad numbers in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.providers import BASELINE
from benchmarks.results import Row
from benchmarks.task import MODES
from benchmarks.timing import Timing


def print_tables(groups: Iterable[Sequence[Row]], console: Console) -> None:
    """One table per group of rows that may be compared, with what is needed to read it underneath."""
    for rows in groups:
        console.print(_table(rows))
        for note in _notes(rows):
            console.print(f"  {note}", style="dim", highlight=False)
        console.print()


def _table(rows: Sequence[Row]) -> Table:
    modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
    judged = modes[-1]  # forward + backward where it was measured
    by_provider = {row.provider: row for row in rows if row.mode == judged}
    baseline = by_provider.get(BASELINE)
    table = Table(
        title=_title(rows[0]),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("ms", no_wrap=True)
    on_gpu = rows[0].environment.get("gpu") is not None
    gpu_columns = ("GB/s", "peak MB", "launches", "host") if on_gpu else ()
    for heading in (*modes, "20-80 %", f"x {BASELINE}", "x floor", "kept MB", "error", *gpu_columns):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in by_provider.items():
        if row.timing is None:
            table.add_row(
                name,
                *["-"] * (len(modes) + 4 + len(gpu_columns)),
                row.status.split(":")[0].replace("unavailable", "n/a"),
                style="red",
            )
            continue
        times = {r.mode: r.timing for r in rows if r.provider == name}
        table.add_row(
            name,
            *(_ms(t.median) if (t := times.get(mode)) else "-" for mode in modes),
            f"{_ms(row.timing.p20)}-{_ms(row.timing.p80)}",
            f"{baseline.timing.median / row.timing.median:.1f}" if baseline and baseline.timing else "-",
            f"{row.timing.median / row.floor:.2f}",
            "-" if row.kept is None else f"{row.kept / 1e6:.2f}",
            "-" if row.error is None else f"{row.error:.0e}",
            *(_gpu_cells(row, row.timing) if on_gpu else ()),
            style="bold" if name.startswith("ours") else "",
        )
    return table


def _gpu_cells(row: Row, timing: Timing) -> tuple[str, ...]:
    return (
        f"{row.bytes / timing.median / 1e6:.0f}",
        "-" if row.peak is None else f"{row.peak / 1e6:.1f}",
        "-" if row.launches is None else str(row.launches),
        "-" if row.host is None else _ms(row.host),
    )


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _title(row: Row) -> str:
    case = ", ".join(f"{name}={value}" for name, value in row.case.items())
    where = row.environment
    machine = where.get("gpu") or f"{where['cpu']}, {where['threads']} thread(s)"
    machine = f"{machine}, torch {where['torch']}"
    state = f"{where['cache']} cache, allocator {where['allocator']}, system load {where['load']}"
    return f"{row.suite}: {case}\n{machine}\n{state}"


def _notes(rows: Sequence[Row]) -> list[str]:
    last = rows[-1]
    on_gpu = last.environment.get("gpu") is not None
    commit = last.environment["commit"] or "unknown"
    modified = " with uncommitted changes" if last.environment["modified"] else ""
    return [
        f"{last.mode}: speed-up over {BASELINE}, 20-80 % quantiles, ratio to the time of moving",
        f"{last.bytes / 1e6:.1f} MB ({last.formula}) {'at the bandwidth of a copy' if on_gpu else 'in the same run'}",
        "kept: saved for backward beyond the inputs; error: worst result against fp64",
        *(
            ["peak: allocated beyond the inputs; host: ms until the call returns while the device is busy"]
            if on_gpu
            else []
        ),
        *(f"{name}: {title}" for name, title in {row.provider: row.title for row in rows}.items()),
        *sorted({f"{row.provider} {row.status}" for row in rows if row.status != "ok"}),
        f"commit {commit}{modified}, {last.run}",
    ]
