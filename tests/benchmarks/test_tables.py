"""What tables and plots say of rows: costs over the plain work, parts in brackets, memory beside memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.markdown import markdown_tables
from benchmarks.plot import plot
from benchmarks.results import Row
from benchmarks.table import print_tables
from benchmarks.timing import Timing

WHERE = {
    "device": "cpu",
    "cpu": "some CPU",
    "threads": 2,
    "torch": "2",
    "cache": "cold",
    "allocator": "kept",
    "load": 0,
    "commit": None,
    "modified": False,
}


def row(provider: str, milliseconds: float, peak: int, **changes: object) -> Row:
    found = Row(
        run="now",
        suite="step",
        case={"model": "a-model", "B": 2},
        provider=provider,
        title=f"title of {provider}",
        mode="step",
        status="ok",
        error=1e-7,
        timing=Timing(milliseconds, milliseconds - 1, milliseconds + 1, milliseconds - 1, 3),
        floor=None,
        bytes=None,
        formula="",
        kept=None,
        environment=WHERE,
        peak=peak,
    )
    return replace(found, **changes)  # type: ignore[arg-type]


ROWS = [
    row("plain", 100, 1_000_000_000),
    row("today", 150, 2_000_000_000),
    row("ours", 110, 1_100_000_000),
    row("teacher-update", 5, 0, part=True),
    row("broken", 1, 0, status="failed: FAILED: loss off by 1", timing=None),
]


def test_table_of_a_step() -> None:
    console = Console(width=60)
    with console.capture() as capture:
        print_tables([ROWS], console)
    lines = {line.split()[0]: line.split() for line in capture.get().splitlines() if line.strip()}
    assert lines["ours"] == ["ours", "110", "109-111", "1.36", "+10.0", "%", "1100", "1.10", "0.55", "1e-07"]
    assert lines["teacher-update"][3:6] == ["-", "(5.0", "%)"], "no speed-up of a part over the whole"
    assert "+" not in "".join(lines["broken"]), "nothing is said for a provider that failed"


def test_markdown_of_a_step() -> None:
    text = markdown_tables([ROWS, [replace(r, case={"model": "b-model", "B": 2}) for r in ROWS[:1]]])
    assert "|  | plain | today | **ours** | teacher-update | broken |" in text
    line = (
        "| model=a-model | 100, 1000 MB | 150 (+50.0 %), 2000 MB | **110 (+10.0 %), 1100 MB** | 5.00 (5.0 %) | failed |"
    )
    assert line in text
    assert "| model=b-model | 100, 1000 MB |  |  |  |  |" in text
    assert text.endswith("B=2")


@pytest.mark.parametrize("form", ["svg", "png"])
def test_plot_of_a_step(form: str, tmp_path: Path) -> None:
    plot([ROWS], tmp_path / f"picture.{form}")
    picture = (tmp_path / f"picture.{form}").read_bytes()
    assert picture.startswith(b"\x89PNG" if form == "png" else b"<?xml")
    if form == "svg":  # whose text is text
        assert all(name in picture for name in (b">teacher-update<", b">110<", b"model=a-model"))


def test_plot_says_warm_and_draws_nothing_for_what_is_not_known(tmp_path: Path) -> None:
    warm = [replace(r, environment={**WHERE, "cache": "warm"}) for r in (ROWS[0], replace(ROWS[2], peak=None))]
    plot([warm], tmp_path / "picture.svg")
    picture = (tmp_path / "picture.svg").read_text()
    assert "caches warm" in picture
    assert picture.count(">0<") == 2, "the two axes' zeros: a peak that was not measured is not 0 MB"


def test_share_of_the_copy_bandwidth() -> None:
    assert row("ours", 10, 0, bytes=10**9, bandwidth=2e11).share == pytest.approx(0.5)
    assert row("ours", 10, 0).share is None
