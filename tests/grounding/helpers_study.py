"""Studies with made-up records: what is reported of them can be worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attbalance_ext.grounding.experiment.record import Record, record_path, write_record
from attbalance_ext.grounding.experiment.spec import Spec, load_spec

SPEC = """
title = "A study"
question = "Does it help?"
baseline = "plain"
data = ["builtin:refcoco-hard", "builtin:referit"]
seeds = [0, 1, 2, 3]

[settings]
steps = 20

[models.transvg-tiny]

[variants.plain]
label = "plain"
attbalance = false

[variants.full]
label = "AttBalance"

[variants.noisy]
label = "noise"
momentum = 0.5

[variants.worse]
label = "worse"
against = ["full"]
momentum = 0.6
"""

ACCURACY = {
    "plain": (0.50, 0.52, 0.49, 0.51),
    "full": (0.60, 0.63, 0.58, 0.61),
    "noisy": (0.40, 0.64, 0.45, 0.55),
    "worse": (0.50, 0.52, 0.49, 0.50),
}
"""acc@0.5 by seed."""


def make_study(folder: Path, text: str = SPEC) -> Spec:
    """The study as a file, without records."""
    path = folder / "study.toml"
    path.write_text(text)
    return load_spec(path)


def add_records(
    spec: Spec, folder: Path, accuracy: Mapping[str, Sequence[float]] = ACCURACY, *, data: Sequence[str] | None = None
) -> None:
    """A record for every cell whose variant, seed and data set have a number."""
    for cell in spec.cells:
        values = accuracy.get(cell.variant, ())
        if cell.seed < len(values) and (data is None or cell.data in data):
            record = make_record(cell.settings.to_dict(), values[cell.seed], splits=spec.splits)
            write_record(record_path(folder, cell.settings), record)


def make_record(settings: dict[str, Any], accuracy: float, *, splits: Sequence[str]) -> Record:
    layers = [0.1, 0.2, 0.3, accuracy]
    result = {
        "samples": 1234,
        "valid": 1234,
        "acc50": accuracy,
        "acc70": accuracy / 2,
        "miou": accuracy - 0.1,
        "in_box": layers,
        "rho": layers,
        "used_in_box": [value / 2 for value in layers],
        "used_visual": [0.9] * 4,
        "by_size": {"small": accuracy - 0.1, "medium": accuracy, "large": accuracy + 0.1},
    }
    point = {name: result[name] for name in ("acc50", "acc70", "miou", "in_box", "rho")}
    with_terms = settings["attbalance"]
    return Record(
        settings=settings,
        results=dict.fromkeys(splits, result),
        curve=[{"step": 10, "seconds": 1.0, **point}, {"step": 20, "seconds": 2.0, **point}],
        training={"adw": 1.4, "odw": 1.2, "dat": 1.68, "rac": 1.0, "mrc": 0.1, "rho": [0.1] * 3} if with_terms else {},
        seconds=2.0,
        step_ms=140.0 if with_terms else 100.0,
        plain_step_ms=101.0 if with_terms else None,
        machine={"cpu": "a processor", "torch": "2.13.0", "cpu threads": "1", "gpu": "none"},
        data_version="0123456789",
        commit="abcdef012345",
        modified=False,
        date="2026-01-01",
    )
