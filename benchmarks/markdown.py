"""The results as the small tables of a README: a line for each case, a column for each way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from benchmarks.results import Row
from benchmarks.runner import FLOOR, FRESH_FLOOR
from benchmarks.suites import SUITES
from benchmarks.table import judged, number, over


def markdown_tables(groups: Iterable[Sequence[Row]]) -> str:
    """One table for each suite and machine: medians, and where a suite has a plain way, what is paid beyond it."""
    ordered = sorted(groups, key=lambda rows: (list(SUITES).index(rows[0].suite), _machine(rows[0])))
    tables = []
    for (suite, machine), members in groupby(ordered, key=lambda rows: (rows[0].suite, _machine(rows[0]))):
        tables.append(f"**{suite}**, {machine}, milliseconds\n\n{_table(list(members))}")
    return "\n\n".join(tables)


def _table(groups: Sequence[Sequence[Row]]) -> str:
    names = list(dict.fromkeys(row.provider for rows in groups for row in rows if row.provider != FRESH_FLOOR))
    names.sort(key=lambda name: name == FLOOR)  # last, as it is nobody's way
    # On a GPU the floor is no row but follows from the bandwidth of the copy.
    floors = [] if FLOOR in names else [_floor(rows) for rows in groups]
    extra = [FLOOR] if any(floors) else []
    shared = _shared([rows[0].case for rows in groups])
    heading = ["", *(f"**{name}**" if name.startswith("ours") else name for name in names), *extra]
    lines = [heading, ["---"] * len(heading)]
    for position, rows in enumerate(groups):
        by_name = {row.provider: row for row in rows if row.mode == judged(rows)}
        label = ", ".join(f"{key}={value}" for key, value in rows[0].case.items() if key not in shared)
        cells = [_cell(by_name.get(name), by_name.get("plain")) for name in names]
        lines.append([label, *cells, *(floors[position] for _ in extra)])
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{text}\n\n{', '.join(f'{key}={value}' for key, value in shared.items())}" if shared else text


def _shared(cases: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """What all lines have in common is said once, below the table, if there are several."""
    first, *others = cases
    return {key: value for key, value in first.items() if others and all(case.get(key) == value for case in others)}


def _cell(row: Row | None, plain: Row | None) -> str:
    if row is None:
        return ""
    if row.timing is None:
        return row.status.split(":")[0]
    text = number(row.timing.median)
    if plain is not None and plain.timing is not None and row is not plain:
        text += f" ({over(row, row.timing, plain.timing).strip('()')})"
    if row.peak and plain is not None and not row.part:
        text += f", {row.peak / 1e6:.0f} MB"
    return f"**{text}**" if row.provider.startswith("ours") else text


def _floor(rows: Sequence[Row]) -> str:
    limit = next((row.limit for row in rows if row.mode == judged(rows)), None)
    return "" if limit is None else number(limit)


def _machine(row: Row) -> str:
    where = row.environment
    machine = where.get("gpu") or f"{where['cpu']}, {where['threads']} thread(s)"
    return f"{machine}, caches {where['cache']}, allocator {where['allocator']}"
