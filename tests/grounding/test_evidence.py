"""docs/evidence.md says what the committed records say."""

from __future__ import annotations

import pytest

from attbalance_ext.grounding.experiment.record import load_record, record_path
from attbalance_ext.grounding.experiment.spec import load_spec
from attbalance_ext.grounding.settings import Settings
from scripts.evidence import FIGURES, PAGE, ROOT, SHOWN, with_tables

RECORDS = sorted((ROOT / "experiments" / "records").glob("*.json"))


def test_tables_are_those_of_the_records() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run: python -m scripts.evidence"


def test_every_figure_is_there_and_no_other() -> None:
    shown = set(SHOWN.findall(PAGE.read_text(encoding="utf-8")))
    assert shown == {path.name for path in FIGURES.iterdir()}
    for name in shown:
        if "does-looking-help" in name:
            assert "each rho over" in (FIGURES / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_records_lie_under_their_own_names(path) -> None:
    """A record that was edited by hand, or whose settings have since got another meaning, is found here."""
    record = load_record(path)
    assert record_path(path.parent, Settings.from_dict(record.settings)) == path
    assert record.commit


def test_no_record_belongs_to_no_study() -> None:
    specs = [load_spec(path) for path in sorted((ROOT / "experiments").glob("*.toml"))]
    known = {record_path(RECORDS[0].parent, cell.settings) for spec in specs for cell in spec.cells}
    assert set(RECORDS) <= known
