"""What the records of a study say: rows with intervals, comparisons, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.experiment.record import Record, load_record, record_path
from attbalance_ext.grounding.experiment.spec import Spec, Variant
from attbalance_ext.grounding.experiment.statistics import Comparison, Interval, adjusted, compare, interval


@dataclass(frozen=True)
class Row:
    """One variant of one model on one data set, over the seeds that have been run."""

    model: str
    data: str
    variant: Variant
    records: dict[int, Record]
    """By seed."""
    split: str
    """The one that comparisons are made on: the study's first."""
    comparisons: dict[str, Comparison]
    """In acc@0.5, by the name of the variant it is compared with, over the seeds that both have."""

    @property
    def seeds(self) -> list[int]:
        return sorted(self.records)

    def over_seeds(self, name: str, split: str | None = None, *, key: str | int | None = None) -> Interval:
        """A result (``acc50``, ``miou``, ...) of a split; ``key``: a layer of a list, or a name of a table."""
        found = [self.records[seed].results[split or self.split][name] for seed in self.seeds]
        return interval([value if key is None else value[key] for value in found])

    def of_training(self, name: str) -> Interval | None:
        """A mean over the training steps with terms; None for a run without them."""
        found = [record.training[name] for record in self.records.values() if record.training]
        return interval(found) if found else None

    @property
    def step_ms(self) -> Interval:
        return interval([record.step_ms for record in self.records.values()])

    @property
    def seconds(self) -> Interval:
        return interval([record.seconds for record in self.records.values()])

    @property
    def samples(self) -> int:
        return next(iter(self.records.values())).results[self.split]["samples"]

    @property
    def layers(self) -> int:
        return len(next(iter(self.records.values())).results[self.split]["rho"])


@dataclass(frozen=True)
class Findings:
    """A study with its records."""

    spec: Spec
    rows: list[Row]
    missing: int
    """Cells without a record."""

    @property
    def groups(self) -> list[tuple[str, str, list[Row]]]:
        """(model, data, rows) for everything that is compared on its own, in the study's order."""
        keys = dict.fromkeys((row.model, row.data) for row in self.rows)
        return [(m, d, [row for row in self.rows if (row.model, row.data) == (m, d)]) for m, d in keys]

    @property
    def records(self) -> list[Record]:
        """Each once, though variants may share it."""
        return list({id(record): record for row in self.rows for record in row.records.values()}.values())

    def row(self, model: str, data: str, variant: str) -> Row | None:
        return next((r for r in self.rows if (r.model, r.data, r.variant.name) == (model, data, variant)), None)


def findings(spec: Spec, folder: Path) -> Findings:
    """Read the records of ``spec`` in ``folder``. No record at all raises ``UserError``."""
    read: dict[Path, Record] = {}
    found: dict[tuple[str, str, str], dict[int, Record]] = {}
    missing = 0
    for cell in spec.cells:
        path = record_path(folder, cell.settings)
        if not path.exists():
            missing += 1
            continue
        record = read.setdefault(path, load_record(path)) if path not in read else read[path]
        if lacking := [split for split in spec.splits if split not in record.results]:
            raise UserError(f"{path} has no results on {', '.join(lacking)}, which {spec.path} reports on")
        found.setdefault((cell.data, cell.model, cell.variant), {})[cell.seed] = record
    if not found:
        raise UserError(f"{folder} has no record of {spec.path}; make them with: attbalance experiment {spec.path}")
    rows = [
        Row(model, data, variant, records, spec.splits[0], _comparisons(found, data, model, variant, spec.splits[0]))
        for data in spec.data
        for model in spec.models
        for variant in spec.variants.values()
        if (records := found.get((data, model, variant.name)))
    ]
    return Findings(spec, _with_adjusted(rows), missing)


def _comparisons(
    found: dict[tuple[str, str, str], dict[int, Record]], data: str, model: str, variant: Variant, split: str
) -> dict[str, Comparison]:
    mine, comparisons = found[data, model, variant.name], {}
    for name in variant.against:
        other = found.get((data, model, name), {})
        if shared := sorted(mine.keys() & other.keys()):
            comparisons[name] = compare(_accuracies(mine, shared, split), _accuracies(other, shared, split))
    return comparisons


def _accuracies(records: dict[int, Record], seeds: Iterable[int], split: str) -> list[float]:
    return [records[seed].results[split]["acc50"] for seed in seeds]


def _with_adjusted(rows: Sequence[Row]) -> list[Row]:
    """The same, with the p-values of the whole study's comparisons adjusted together."""
    p = iter(adjusted([comparison.p for row in rows for comparison in row.comparisons.values()]))
    return [
        replace(row, comparisons={name: replace(c, adjusted_p=next(p)) for name, c in row.comparisons.items()})
        for row in rows
    ]


def machines(records: Sequence[Record]) -> list[str]:
    """Where and with which code the records were made, each combination once."""

    def line(record: Record) -> str:
        machine: dict[str, Any] = record.machine
        code = f"commit {record.commit or 'unknown'}{' with changes' if record.modified else ''}"
        where = machine["gpu"] if record.settings["device"].startswith("cuda") else machine["cpu"]
        return f"{where}, {machine['cpu threads']} threads a run; PyTorch {machine['torch']}; {code}; {record.date}"

    return sorted({line(record) for record in records})
