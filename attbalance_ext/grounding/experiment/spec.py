"""What a study compares: models x data x variants x seeds, read from one TOML file."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attbalance_ext import AttBalanceConfig
from attbalance_ext.grounding.data.names import BuiltinName, check_split
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.experiment.typed import NAMES, fitting
from attbalance_ext.grounding.settings import Settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SPLITS = ("fresh", "fresh_novel")
"""Splits of built-in data that cells are evaluated on, unless the study names others."""


@dataclass(frozen=True)
class Variant:
    """One way to train. ``label``: as tables call it; ``against``: the variants it is compared with."""

    name: str
    label: str
    against: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """One training run of a study."""

    model: str
    data: str
    variant: str
    seed: int
    settings: Settings

    @property
    def name(self) -> str:
        return f"{self.model} {self.data.removeprefix('builtin:')} {self.variant} seed {self.seed}"


@dataclass(frozen=True)
class Spec:
    """A study. Cells are in the order to run them: every seed whole before the next, so that a part is balanced."""

    path: Path
    title: str
    question: str
    splits: tuple[str, ...]
    models: tuple[str, ...]
    data: tuple[str, ...]
    variants: dict[str, Variant]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        return self.path.stem

    def chosen(
        self,
        *,
        models: Sequence[str] = (),
        data: Sequence[str] = (),
        variants: Sequence[str] = (),
        seeds: Sequence[int] = (),
    ) -> list[Cell]:
        """The cells with one of the given values; nothing given: any. A value that is not there: ``UserError``."""
        wanted = {"model": models, "data": data, "variant": variants, "seed": seeds}
        known = {"model": self.models, "data": self.data, "variant": tuple(self.variants), "seed": self.seeds}
        for axis, values in wanted.items():
            for value in values:
                if value not in known[axis]:
                    there = ", ".join(map(str, known[axis]))
                    raise UserError(f"{self.path} has no {axis} {value!r}; there is: {there}")
        return [c for c in self.cells if all(not v or getattr(c, axis) in v for axis, v in wanted.items())]


def load_spec(path: Path) -> Spec:
    """Read a study.

    ::

        title = "RAC with and without rho"
        question = "Does weighting layers by rho help?"
        baseline = "plain"                       # what variants are compared with
        data = ["builtin:refcoco-hard"]
        seeds = [0, 1, 2]
        splits = ["fresh", "fresh_novel"]        # optional

        [settings]                               # of every run: names of Settings
        steps = 1000

        [models.transvg-tiny]                    # settings of a model; `model` where its name here is another
        [models.deep]
        model = "transvg-tiny"
        model_options = { layers = 6 }

        [variants.plain]
        attbalance = false
        [variants.rac]
        label = "RAC"                            # optional, as are note and against: ["plain", ...], with what to
                                                 # compare it instead of the baseline
        loss = { weight_mrc = 0.0 }

    Later tables go first: a variant's setting counts before its model's, that before ``[settings]``. Tables (``loss``,
    ``model_options``) are merged.

    Raises:
        UserError: no such file, no TOML, a name that is unknown or missing, settings that cannot be used.
    """
    try:
        text = path.read_text(encoding="utf-8")
        plain = tomllib.loads(text)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no TOML: {error}") from None
    try:
        return _spec(path, plain)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


_REQUIRED = {
    "title": str,
    "question": str,
    "baseline": str,
    "data": list,
    "seeds": list,
    "models": dict,
    "variants": dict,
}
_OPTIONAL = {"splits": list, "settings": dict}
_OF_A_VARIANT = ("label", "note", "against")
_AXES = ("data", "seed")
"""Settings that a study has lists of, and so no table."""


def _spec(path: Path, plain: dict[str, Any]) -> Spec:
    _require(plain, _REQUIRED, _OPTIONAL)
    baseline, variants = plain["baseline"], plain["variants"]
    if baseline not in variants:
        raise UserError(f"baseline {baseline!r} is no variant; there is: {', '.join(variants)}")
    described = {name: _variant(name, table, baseline) for name, table in variants.items()}
    for variant in described.values():
        for other in variant.against:
            if other not in described:
                raise UserError(f"variants.{variant.name} is compared with {other!r}, which is no variant")
            if other == variant.name:
                raise UserError(f"variants.{variant.name} is compared with itself")
    splits = tuple(plain.get("splits", SPLITS))
    cells = tuple(
        Cell(model, data, variant, seed, _settings(model, data, seed, plain, variant))
        for seed in plain["seeds"]
        for data in plain["data"]
        for model in plain["models"]
        for variant in variants
    )
    if any(cell.settings.data_root is None for cell in cells):  # files are looked for when they are needed
        for data in plain["data"]:
            BuiltinName.parse(data)
        for split in splits:
            check_split(split)
    return Spec(
        path=path,
        title=plain["title"],
        question=plain["question"],
        splits=splits,
        models=tuple(plain["models"]),
        data=tuple(plain["data"]),
        variants=described,
        seeds=tuple(plain["seeds"]),
        cells=cells,
    )


def _require(plain: Mapping[str, Any], required: Mapping[str, type], optional: Mapping[str, type]) -> None:
    known = {**required, **optional}
    if unknown := set(plain) - set(known):
        raise UserError(f"unknown names {', '.join(sorted(unknown))}; there is: {', '.join(known)}")
    if missing := set(required) - set(plain):
        raise UserError(f"missing: {', '.join(sorted(missing))}")
    for name, value in plain.items():
        if not isinstance(value, known[name]):
            raise UserError(f"{name} must be {NAMES[known[name]]}, got {value!r}")
        if not value and name != "settings":
            raise UserError(f"{name} is empty")
    for name in ("models", "variants"):
        for key, table in plain[name].items():
            if not isinstance(table, dict):
                raise UserError(f"{name}.{key} must be a table, got {table!r}")
    for name, kind in (("seeds", int), ("data", str), ("splits", str)):
        values = plain.get(name, [])
        for position, value in enumerate(values):
            if type(value) is not kind:  # True is an int
                raise UserError(f"an item of {name} must be {NAMES[kind]}, got {value!r}")
            if value in values[:position]:
                raise UserError(f"{name} has {value!r} twice")


def _variant(name: str, table: Mapping[str, Any], baseline: str) -> Variant:
    for key in ("label", "note"):
        if not isinstance(table.get(key, ""), str):
            raise UserError(f"variants.{name}: {key} must be {NAMES[str]}, got {table[key]!r}")
    against = table.get("against", [baseline] if name != baseline else [])
    if not isinstance(against, list) or not all(isinstance(other, str) for other in against):
        raise UserError(f"variants.{name}: against must be a list of texts, got {against!r}")
    return Variant(name, table.get("label", name), tuple(against), table.get("note", ""))


def _settings(model: str, data: str, seed: int, plain: Mapping[str, Any], variant: str) -> Settings:
    described = plain["variants"][variant]
    tables = {
        "settings": plain.get("settings", {}),
        f"models.{model}": {"model": model, **plain["models"][model]},
        f"variants.{variant}": {name: value for name, value in described.items() if name not in _OF_A_VARIANT},
    }
    changes: dict[str, Any] = {}
    loss: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, table in tables.items():
        if axes := set(table) & set(_AXES):
            raise UserError(f"{name}: {', '.join(sorted(axes))} cannot be set in a table; the study has a list of them")
        own = fitting(name, table, Settings, loss=dict)
        loss.update(fitting(f"{name}.loss", own.pop("loss", {}), AttBalanceConfig))
        options.update(own.pop("model_options", {}))
        changes.update(own)
    try:
        return Settings.for_model(
            changes.pop("model"), loss=loss, model_options=options, **changes, data=data, seed=seed
        )
    except UserError as error:
        raise UserError(f"models.{model} with variants.{variant}: {error}") from None
