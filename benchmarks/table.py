"""The results as tables for the terminal: small, and with the bad numbers in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.results import Row
from benchmarks.suites import SUITES
from benchmarks.task import MODES
from benchmarks.timing import Timing


def print_tables(groups: Iterable[Sequence[Row]], console: Console) -> None:
    """One table per group of rows that may be compared, with what is needed to read it underneath."""
    for rows in groups:
        table = _table(rows)
        # Whole lines also where the terminal is narrow, or is none: numbers must not be cut.
        wide = console.options.update(max_width=1000)
        console.width = max(console.width, console.measure(table, options=wide).maximum)
        console.print(table)
        for note in _notes(rows):
            console.print(f"  {note}", style="dim", highlight=False)
        console.print()


@dataclass(frozen=True)
class Column:
    """A heading and what stands under it for a row that was timed."""

    heading: str
    cell: Callable[[Row, Timing], str]


def judged(rows: Sequence[Row]) -> str:
    """The mode that is judged: forward + backward where it was measured."""
    return next(mode for mode in reversed(MODES) if any(row.mode == mode for row in rows))


def _table(rows: Sequence[Row]) -> Table:
    columns = _columns(rows)
    table = Table(title=_title(rows[0]), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("ms", no_wrap=True)
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for row in rows:
        if row.mode != judged(rows):
            continue
        if row.timing is None:
            state = row.status.split(":")[0].replace("unavailable", "n/a")
            table.add_row(row.provider, *["-"] * (len(columns) - 1), state, style="red")
        else:
            cells = [column.cell(row, row.timing) for column in columns]
            table.add_row(row.provider, *cells, style="bold" if row.provider.startswith("ours") else "")
    return table


def _columns(rows: Sequence[Row]) -> list[Column]:
    """What can be said of these rows; a column in which nothing would stand is left out."""
    times = {(row.provider, row.mode): row.timing for row in rows if row.timing}
    baselines = {
        name: timing
        for name in SUITES[rows[0].suite].baselines
        if (timing := times.get((name, judged(rows)))) is not None
    }
    columns = [
        Column(mode, lambda row, timing, mode=mode: _ms(times.get((row.provider, mode))))  # type: ignore[misc]
        for mode in MODES
        if any(row.mode == mode for row in rows)
    ]
    columns.append(Column("20-80 %", lambda row, timing: f"{number(timing.p20)}-{number(timing.p80)}"))
    columns += [_speed_up(name, baseline) for name, baseline in baselines.items() if name != "plain"]
    if "plain" in baselines:
        columns.append(Column("over plain", lambda row, timing: over(row, timing, baselines["plain"])))
    if any(row.limit is not None for row in rows):
        columns.append(Column("x floor", lambda row, timing: f"{timing.median / row.limit:.2f}" if row.limit else "-"))
    if any(row.share is not None for row in rows):
        columns.append(Column("% of copy", lambda row, timing: "-" if row.share is None else f"{100 * row.share:.0f}"))
    if any(row.kept is not None for row in rows):
        columns.append(_size("kept", rows, lambda row: row.kept))
    if (keys := _key_bytes(rows[0].case)) is not None:
        columns.append(
            Column("% of K", lambda row, timing: "-" if row.kept is None else f"{100 * row.kept / keys:.1f}")
        )
    if any(row.peak is not None for row in rows):
        columns.append(_size("peak", rows, lambda row: row.peak))
        if "plain" in baselines:
            columns += [_memory_ratio(row) for row in rows if row.provider in baselines and row.peak]
    columns.append(Column("error", lambda row, timing: "-" if row.error is None else f"{row.error:.0e}"))
    if rows[0].environment.get("gpu") is not None:
        columns += [
            Column("launches", lambda row, timing: "-" if row.launches is None else str(row.launches)),
            Column("host", lambda row, timing: "-" if row.host is None else number(row.host)),
        ]
    return columns


def _size(name: str, rows: Sequence[Row], size: Callable[[Row], int | None]) -> Column:
    """A column of bytes, in one unit: kB where megabytes would be zeros."""
    unit, divisor = ("kB", 1e3) if max(size(row) or 0 for row in rows) < 1e5 else ("MB", 1e6)

    def cell(row: Row, timing: Timing) -> str:
        if (count := size(row)) is None:
            return "-"
        return f"{count / divisor:.2f}" if count / divisor < 100 else f"{count / divisor:.0f}"

    return Column(f"{name} {unit}", cell)


def _speed_up(name: str, baseline: Timing) -> Column:
    return Column(f"x {name}", lambda row, timing: "-" if row.part else f"{baseline.median / timing.median:.2f}")


def _memory_ratio(baseline: Row) -> Column:
    def cell(row: Row, timing: Timing) -> str:
        return "-" if row.part or not row.peak or not baseline.peak else f"{row.peak / baseline.peak:.2f}"

    return Column(f"of {baseline.provider}'s", cell)


def over(row: Row, timing: Timing, plain: Timing) -> str:
    """What a row costs beyond the plain work, or, for a part of the work, as much as that part is of it."""
    if row.part:
        return f"({100 * timing.median / plain.median:.1f} %)"
    return f"{100 * (timing.median / plain.median - 1):+.1f} %"


def _key_bytes(case: Mapping[str, object]) -> int | None:
    """The size of all keys, where the case is one of keys."""
    if "dtype" not in case:
        return None
    size: int = getattr(torch, str(case["dtype"])).itemsize
    for name in "LBND":
        size *= int(str(case[name]))
    return size


def _ms(timing: Timing | None) -> str:
    return "-" if timing is None else number(timing.median)


def number(value: float) -> str:
    """Three digits or so; of milliseconds, never less than a tenth of a microsecond."""
    digits = next((digits for limit, digits in ((0.1, 4), (1, 3), (10, 2), (100, 1)) if value < limit), 0)
    return f"{value:.{digits}f}"


def _title(row: Row) -> str:
    where = row.environment
    machine = where.get("gpu") or f"{where['cpu']}, {where['threads']} thread(s)"
    machine = f"{machine}, torch {where['torch']}"
    state = f"{where['cache']} cache, allocator {where['allocator']}, system load {where['load']}"
    return f"{row.suite}: {describe(row.case)}\n{machine}\n{state}"


def describe(case: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in case.items())


def _notes(rows: Sequence[Row]) -> list[str]:
    last = rows[-1]
    on_gpu = last.environment.get("gpu") is not None
    commit = last.environment["commit"] or "unknown"
    modified = " with uncommitted changes" if last.environment["modified"] else ""
    notes = [
        f"judged: {judged(rows)}; x NAME: speed-up over it; error: worst result against the truth",
        "kept: saved for backward beyond the inputs; peak: allocated in forward + backward beyond what was there",
    ]
    if last.bytes is not None and any(row.share is not None for row in rows):
        bandwidth = "" if last.bandwidth is None else f"; a large copy moves {last.bandwidth / 1e9:.1f} GB/s"
        notes.append(f"{last.mode}: {last.bytes / 1e6:.2f} MB ({last.formula}){bandwidth}")
    if any(row.limit is not None for row in rows):
        notes.append(f"floor: moving these bytes {'at the bandwidth of that copy' if on_gpu else 'in the same run'}")
    if any(row.part for row in rows):
        notes.append("over plain, in brackets: what a part of the step takes, as much as it is of the plain step")
    if on_gpu:
        notes.append("host: ms until the call returns while the device is busy, waiting for it included")
    return [
        *notes,
        *(f"{name}: {title}" for name, title in {row.provider: row.title for row in rows}.items()),
        *sorted({f"{row.provider} {row.status}" for row in rows if row.status != "ok"}),
        f"commit {commit}{modified}, {last.run}",
    ]
