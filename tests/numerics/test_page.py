"""docs/numerics.md states the bounds that the tests assert, and measurements that keep them."""

from __future__ import annotations

import re

from scripts.numerics import EVERY, MEASURED, PAGE, STORAGE, TABLE, TABLES, with_tables
from tests.numerics.bounds import ATTENTION, LOSS, PARTIAL_SUM, PARTIAL_SUM_TEXT

TEXT = PAGE.read_text(encoding="utf-8")


def measured(name: str) -> list[list[str]]:
    """The cells of a measured table, without its heading."""
    (found,) = (body for _, place, body, _ in TABLE.findall(TEXT) if place == name)
    lines = [line for line in found.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_bounds_are_those_of_the_tests() -> None:
    assert {name for _, name, _, _ in TABLE.findall(TEXT)} == set(TABLES)
    assert with_tables(TEXT, measure_again=False) == TEXT, "run: python -m scripts.numerics"


def test_a_partial_sum_is_what_its_text_says() -> None:
    for backend, text in PARTIAL_SUM_TEXT.items():
        code = re.sub(r"8 ⌈D / 256⌉", "8 * -(-D // 256)", text)
        for width in (1, 7, 16, 33, 256, 257, 1024):
            assert PARTIAL_SUM[backend](width) == eval(code, {"D": width}), backend


def test_every_quantity_was_measured_within_its_bound() -> None:
    terms, loss = map(measured, MEASURED)
    assert [row[:2] for row in terms] == [[b.title, dtype] for b in ATTENTION.values() for dtype in STORAGE.values()]
    assert [row[0] for row in loss] == [bound.title for bound in LOSS.values()]
    for row in (*terms, *loss):
        assert len(row) >= 1 + len(EVERY)
    shares = [float(share) for row in (*terms, *loss) for share in re.findall(r"([\d.]+) %", " ".join(row))]
    # fp64 in two backends; the reference has no factors g.
    expected = (3 * len(EVERY) + 2) * len(ATTENTION) - len(STORAGE) + len(EVERY) * len(LOSS)
    assert len(shares) == expected
    assert max(shares) <= 100
