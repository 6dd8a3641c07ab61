"""What a report says of records: intervals, paired tests, verdicts, what is missing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_study import ACCURACY, add_records, make_record, make_study
from scipy import stats

from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.experiment.findings import findings
from attbalance_ext.grounding.experiment.record import record_path, write_record
from attbalance_ext.grounding.experiment.statistics import Comparison, Interval, adjusted, compare, interval

HARD, EASY = "builtin:refcoco-hard", "builtin:referit"


def test_interval_by_hand() -> None:
    values = [0.60, 0.63, 0.58, 0.61]
    found = interval(values)
    mean = sum(values) / 4
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 3 / 4)
    half = 3.182446305284263 * error  # Student's t, 3 degrees of freedom, 97.5 %
    assert found.mean == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half))
    assert found.n == 4


def test_interval_covers_as_often_as_it_says() -> None:
    samples = stats.norm(0.6, 0.03).rvs(size=(1500, 5), random_state=0)
    covered = sum(found.low <= 0.6 <= found.high for found in map(interval, samples.tolist()))
    assert covered / 1500 == pytest.approx(0.95, abs=0.017)  # three standard errors


def test_interval_of_few() -> None:
    one, none, same = interval([0.3]), interval([]), interval([0.3, 0.3, 0.3])
    assert (one.mean, one.n) == (0.3, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert math.isnan(none.mean)
    assert (same.low, same.high) == (0.3, 0.3)
    assert interval([0.2, math.nan, 0.4]) == interval([0.2, 0.4])


def test_comparison_is_paired() -> None:
    """Seeds differ by far more than the variants do within one seed: only a paired test sees it."""
    plain, full = [0.2, 0.4, 0.6, 0.8], [0.21, 0.412, 0.61, 0.811]
    found = compare(full, plain)
    assert found.p == pytest.approx(stats.ttest_rel(full, plain).pvalue)
    assert found.p < 0.01 < stats.ttest_ind(full, plain).pvalue
    assert found.difference.mean == pytest.approx(0.01075)
    assert found.difference.low > 0
    assert math.isnan(compare([0.5], [0.4]).p)
    assert math.isnan(compare([0.5, 0.6], [0.4, 0.5]).p)  # no spread: no test


def test_a_verdict_is_that_of_the_adjusted_p_value() -> None:
    more = Interval(0.1, 0.01, 0.19, 4)
    assert Comparison(more, p=0.04, adjusted_p=0.08).verdict == "open"
    assert Comparison(more, p=0.04, adjusted_p=0.04).verdict == "helps"
    assert Comparison(more, p=0.04).verdict == ""


def test_adjusting_leaves_nan_out() -> None:
    assert adjusted([math.nan, 0.01, math.nan, 0.04]) == pytest.approx([math.nan, 0.02, math.nan, 0.04], nan_ok=True)
    assert adjusted([0.01, 0.01, 0.5, 0.5]) == pytest.approx([0.02, 0.02, 0.5, 0.5])
    assert adjusted([]) == []


def test_rows_and_verdicts(tmp_path: Path) -> None:
    spec = make_study(tmp_path)
    add_records(spec, tmp_path / "records")
    found = findings(spec, tmp_path / "records")
    assert found.missing == 0
    assert [(model, data) for model, data, _ in found.groups] == [("transvg-tiny", HARD), ("transvg-tiny", EASY)]
    rows = {row.variant.name: row for row in found.groups[0][2]}
    assert list(rows) == ["plain", "full", "noisy", "worse"]
    verdicts = {name: {n: c.verdict for n, c in row.comparisons.items()} for name, row in rows.items()}
    assert verdicts == {
        "plain": {},
        "full": {"plain": "helps"},
        "noisy": {"plain": "open"},
        "worse": {"full": "hurts"},
    }
    assert rows["full"].over_seeds("acc50").mean == pytest.approx(0.605)
    assert rows["full"].over_seeds("in_box", key=-1).mean == pytest.approx(0.605)
    assert rows["full"].over_seeds("by_size", key="small").mean == pytest.approx(0.505)
    assert rows["worse"].comparisons["full"].difference.mean == pytest.approx(
        sum(ACCURACY["worse"]) / 4 - sum(ACCURACY["full"]) / 4
    )
    p = [stats.ttest_rel(ACCURACY[a], ACCURACY[b]).pvalue for a, b in (("full", "plain"), ("noisy", "plain"))]
    p.append(stats.ttest_rel(ACCURACY["worse"], ACCURACY["full"]).pvalue)
    wanted = stats.false_discovery_control(p * 2)  # both data sets hold the same numbers: six comparisons
    assert [
        c.adjusted_p for name in ("full", "noisy", "worse") for c in rows[name].comparisons.values()
    ] == pytest.approx(wanted[:3].tolist(), rel=1e-4)
    assert rows["plain"].of_training("dat") is None
    assert rows["full"].of_training("dat") == interval([1.68] * 4)


def test_figures_are_of_the_first_split_unless_another_is_named(tmp_path: Path) -> None:
    spec = make_study(tmp_path)
    for cell in spec.cells:
        record = make_record(cell.settings.to_dict(), 0.6, splits=spec.splits)
        other = {**record.results[spec.splits[-1]], "acc50": 0.3}
        results = {**record.results, spec.splits[-1]: other}
        write_record(record_path(tmp_path, cell.settings), replace(record, results=results))
    assert len(spec.splits) == 2
    row = findings(spec, tmp_path).rows[1]
    assert row.over_seeds("acc50").mean == pytest.approx(0.6)
    assert row.over_seeds("acc50", spec.splits[-1]).mean == pytest.approx(0.3)


def test_the_box_loss_weighs_what_its_alpha_and_dat_make_of_it(tmp_path: Path) -> None:
    spec = make_study(tmp_path)
    add_records(spec, tmp_path)
    plain, full, *_ = findings(spec, tmp_path).rows
    assert plain.box_weight == plain.records[0].settings["loss"]["alpha_giou"]
    assert full.box_weight == pytest.approx(1.68 * full.records[0].settings["loss"]["alpha_giou"])


def test_part_of_a_study(tmp_path: Path) -> None:
    """Seeds that only one of two variants has are in its mean, and not in their comparison."""
    spec = make_study(tmp_path)
    few = {"plain": ACCURACY["plain"][:2], "full": ACCURACY["full"][:3]}
    add_records(spec, tmp_path, few, data=[HARD])
    found = findings(spec, tmp_path)
    assert found.missing == len(spec.cells) - 5
    plain, full = found.rows
    assert (plain.seeds, full.seeds) == ([0, 1], [0, 1, 2])
    assert full.over_seeds("acc50").n == 3
    assert full.comparisons["plain"].difference.n == 2
    assert full.comparisons["plain"].difference.mean == pytest.approx((0.10 + 0.11) / 2)


def test_variant_without_its_reference(tmp_path: Path) -> None:
    spec = make_study(tmp_path)
    add_records(spec, tmp_path, {"worse": ACCURACY["worse"]})
    (first, _) = findings(spec, tmp_path).rows
    assert first.comparisons == {}


def test_no_records(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no record of .*study.toml; make them with: attbalance experiment"):
        findings(make_study(tmp_path), tmp_path)


def test_records_without_a_split(tmp_path: Path) -> None:
    spec = make_study(tmp_path)
    cell = spec.cells[0]
    path = record_path(tmp_path, cell.settings)
    write_record(path, make_record(cell.settings.to_dict(), 0.5, splits=["val"]))
    with pytest.raises(UserError, match="has no results on fresh, fresh_novel"):
        findings(spec, tmp_path)
