"""The results file: JSON lines, one row per provider, case and mode. Appended to, never rewritten."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attbalance_ext.grounding.provenance import ROOT
from benchmarks.timing import Timing

RESULTS = ROOT / "benchmarks" / "results" / "results.jsonl"
_LEAST = 1e-3  # ms: calling anything takes longer


@dataclass(frozen=True)
class Row:
    """One provider in one mode of one case. Times in ms; `timing` is None where the provider was not timed."""

    run: str  # when the run started, UTC; rows of one run were interleaved and may be compared
    suite: str
    case: dict[str, Any]
    provider: str
    title: str
    mode: str
    status: str  # "ok", "failed: ..." (the gate's verdict) or "unavailable: ..."
    error: float | None  # worst relative error against the suite's truth
    timing: Timing | None
    floor: float | None  # ms of moving `bytes`: on a CPU the median in the same run, on a GPU at its copy bandwidth
    bytes: int | None  # what has to be moved; None in suites that are bound by arithmetic
    formula: str
    kept: int | None  # bytes autograd keeps beyond inputs
    environment: dict[str, Any]
    peak: int | None = None  # bytes allocated at the peak of forward + backward beyond what was there before
    part: bool = False  # a part of the work alone
    bandwidth: float | None = None  # bytes a second that a large copy reads and writes, in the same run
    # On a GPU alone:
    launches: int | None = None  # kernels, copies and fills of one call
    host: float | None = None  # ms until the call returns, with the device busy: what it costs the Python thread

    @property
    def limit(self) -> float | None:
        """The floor, where it says something: not where the bytes are so few that no call could be as fast."""
        return None if self.floor is None or self.floor < _LEAST else self.floor

    @property
    def share(self) -> float | None:
        """The bytes moved a second over the bandwidth of the copy; None where the bytes are too few to matter."""
        if self.bytes is None or self.bandwidth is None or self.timing is None:
            return None
        copied = 1e3 * self.bytes / self.bandwidth
        return None if copied < _LEAST else copied / self.timing.median

    @property
    def group(self) -> str:
        """Rows with the same group belong in one table: the same case on the same machine and settings."""
        names = ("device", "cpu", "gpu", "threads", "cache", "allocator")
        settings = {name: self.environment.get(name) for name in names}
        return json.dumps([self.suite, self.case, settings], sort_keys=True)


def append(rows: Iterable[Row], path: Path = RESULTS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def load(path: Path = RESULTS) -> list[Row]:
    """Every row of the file, oldest first; none when there is no file."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [Row(**{**row, "timing": row["timing"] and Timing(**row["timing"])}) for row in rows]


def latest(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of the newest run of every group, in the order they were measured."""
    newest: dict[str, list[Row]] = {}
    for row in rows:
        group = newest.setdefault(row.group, [])
        if group and group[0].run != row.run:
            group.clear()
        group.append(row)
    return list(newest.values())
