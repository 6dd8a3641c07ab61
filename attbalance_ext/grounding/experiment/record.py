"""What is kept of a cell: one small JSON file, so that a study can be added to piece by piece and read anywhere."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.files import write_text
from attbalance_ext.grounding.settings import Settings

FORMAT = 1
"""Raised when the fields of a record change their meaning; files of another format are refused."""

ELSEWHERE = ("device", "backend", "workers", "checkpoint_every", "data_root", "compile", "on_nan")
"""Settings that say where and how a run is computed, and not what; with either ``on_nan`` a run whose loss stays finite
is the same."""

POINT = {"step", "seconds", "acc50", "acc70", "miou", "in_box", "rho"}
RESULT = POINT - {"step", "seconds"} | {"samples", "valid", "used_in_box", "used_visual", "by_size"}
"""What a point of a curve and the result on a split say at least."""


@dataclass(frozen=True)
class Record:
    """One finished run. Everything is of its last checkpoint: no checkpoint was chosen by its accuracy."""

    settings: dict[str, Any]
    results: dict[str, dict[str, Any]]
    """By split: samples, valid, acc50, acc70, miou, by_size, and per layer in_box, rho, used_in_box, used_visual."""
    curve: list[dict[str, Any]]
    """Validations: step, seconds of training until then, acc50, acc70, miou, in_box, rho."""
    training: dict[str, Any]
    """Means over the log's windows with attention terms: adw, odw, dat (the product of their means), rac, mrc, rho per
    layer; empty without terms."""
    seconds: float
    """Of all training steps; validations and start are not counted."""
    step_ms: float
    """Median, of the steps with terms where the run has them."""
    plain_step_ms: float | None
    """Of the steps after them; None for a run without such steps."""
    machine: dict[str, Any]
    data_version: str | None
    commit: str | None
    modified: bool
    date: str


def record_path(folder: Path, settings: Settings) -> Path:
    """Where the record of a run with ``settings`` lies: equal settings, in whatever study, are one file."""
    data = settings.data.removeprefix("builtin:").replace("/", "_")
    return folder / f"{settings.model}_{data}_{settings.seed}_{identity(settings)}.json"


def identity(settings: Settings) -> str:
    """A short name of everything that decides what a run computes."""
    plain = {name: value for name, value in settings.to_dict().items() if name not in ELSEWHERE}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def write_record(path: Path, record: Record) -> None:
    """Write the file, whole or not at all. Six digits of every result are kept, and all of a setting.

    What is not a number, as the mean of nothing, is null: JSON has no NaN.
    """
    plain = {name: value if name == "settings" else _rounded(value) for name, value in asdict(record).items()}
    write_text(path, json.dumps({"format": FORMAT, **plain}, indent=1) + "\n")


def load_record(path: Path) -> Record:
    """Read a record. A damaged file or one of another format raises ``UserError``."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        version = plain.pop("format")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a record: {error}") from None
    except KeyError:
        raise UserError(f"{path} is no record: it does not say its format") from None
    if version != FORMAT:
        raise UserError(f"{path} is a record of format {version}; this version reads format {FORMAT}")
    if set(plain) != {item.name for item in fields(Record)}:
        raise UserError(f"{path} is no record: its fields are {', '.join(sorted(plain))}")
    for name, table in {**_tables(plain["results"], "results"), **_tables(plain["curve"], "curve")}.items():
        wanted = RESULT if name.startswith("results") else POINT
        if not isinstance(table, dict) or not wanted <= set(table):
            lacking = ", ".join(sorted(wanted - set(table))) if isinstance(table, dict) else "everything"
            raise UserError(f"{path} is no record: {name} lacks {lacking}")
    return Record(**plain)


def _tables(value: Any, name: str) -> dict[str, Any]:
    """The tables in a table or list of them, by where they stand; ``value`` itself where it is neither."""
    if isinstance(value, dict):
        return {f"{name}.{key}": item for key, item in value.items()}
    if isinstance(value, list):
        return {f"{name}[{position}]": item for position, item in enumerate(value)}
    return {name: value}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
