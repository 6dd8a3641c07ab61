"""Records: read back as they were written, found by what decides a run, refused where they are something else."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from attbalance_ext import AttBalanceConfig
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.experiment.record import FORMAT, Record, identity, load_record, record_path, write_record
from attbalance_ext.grounding.settings import Settings

POINT = {"acc50": 5 / 7, "acc70": 0.0, "miou": 0.25, "in_box": [0.5, 0.5], "rho": [1 / 3, -2e-9]}
USED = {"used_in_box": [0.5, 0.5], "used_visual": [1.0, 1.0]}
RESULTS = {"samples": 7, "valid": 6, **POINT, **USED, "by_size": {"small": 0.0}}
ROUNDED = {**RESULTS, "acc50": 0.714286, "rho": [0.333333, -2e-9]}
RECORD = Record(
    settings=Settings(loss=AttBalanceConfig(alpha_ar=0.1 + 0.2)).to_dict(),
    results={"fresh": RESULTS},
    curve=[{**POINT, "step": 100, "seconds": 1234567.89, "acc50": 0.123456789, "rho": [0.5]}],
    training={"adw": 1.23456789, "rho": [0.1]},
    seconds=12.3456789,
    step_ms=1e-7 / 3,
    plain_step_ms=None,
    machine={"cpu": "C", "cpu threads": "1"},
    data_version="v",
    commit=None,
    modified=True,
    date="2024-01-02",
)


def test_comes_back_with_six_digits_of_results_and_all_of_a_setting(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_record(path, RECORD)
    found = load_record(path)
    assert found.settings == RECORD.settings
    assert found.settings["terms_fraction"] == 2 / 3
    assert Settings.from_dict(found.settings) == Settings(loss=AttBalanceConfig(alpha_ar=0.1 + 0.2))
    assert found == replace(
        RECORD,
        results={"fresh": ROUNDED},
        curve=[{**POINT, "step": 100, "seconds": 1234570.0, "acc50": 0.123457, "rho": [0.5]}],
        training={"adw": 1.23457, "rho": [0.1]},
        seconds=12.3457,
        step_ms=3.33333e-08,
    )
    write_record(path, found)
    assert load_record(path) == found  # rounding twice is rounding once
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_is_json_for_every_reader(tmp_path: Path) -> None:
    """The mean of nothing is not a number, which JSON does not know."""
    path = tmp_path / "a.json"
    write_record(
        path, replace(RECORD, results={"fresh": {**RESULTS, "miou": math.nan, "in_box": [math.nan, 1.0, math.inf]}})
    )

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found["results"] == {"fresh": {**ROUNDED, "miou": None, "in_box": [None, 1.0, None]}}
    assert load_record(path).results == found["results"]


# Every setting with another value than it usually has.
CHANGES: dict[str, Any] = {
    "model": "vltvg-tiny",
    "model_options": {"layers": 3},
    "data": "builtin:refcoco-hard",
    "data_root": "folder",
    "wrong_boxes": "error",
    "tokenizer": "folder",
    "size": 128,
    "train_share": 0.5,
    "augment": True,
    "flip": False,
    "workers": 2,
    "seed": 1,
    "steps": 1001,
    "epochs": 3,
    "batch_size": 32,
    "accumulate": 2,
    "learning_rate": 1e-3,
    "vision_rate": 1e-4,
    "text_rate": 1e-4,
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "schedule": "step",
    "drop_fraction": 0.5,
    "frozen_parts": ("text",),
    "frozen_fraction": 0.5,
    "clip": None,
    "precision": "bf16",
    "pretrain_steps": 0,
    "attbalance": False,
    "loss": AttBalanceConfig(weight_mrc=0.5),
    "terms_fraction": 0.5,
    "momentum": 0.99,
    "teacher_precision": "bf16",
    "rule": "center",
    "backend": "reference",
    "on_nan": "skip",
    "device": "cuda:1",
    "compile": True,
    "validate_every": 50,
    "validation_samples": 10,
    "checkpoint_every": 5,
    "early_stop": 3,
}
SAME = {"device", "backend", "workers", "checkpoint_every", "compile", "data_root", "on_nan"}


def test_every_setting_is_looked_at_below() -> None:
    assert set(CHANGES) == {item.name for item in fields(Settings)}


@pytest.mark.parametrize("name", CHANGES)
def test_what_decides_a_run_is_its_identity(name: str) -> None:
    usual, other = Settings(), replace(Settings(), **{name: CHANGES[name]})
    assert other != usual
    assert (identity(other) == identity(usual)) == (name in SAME)


@pytest.mark.parametrize(
    "changes",
    [{name: 0.5} for name in ("alpha_ar", "alpha_l1", "alpha_giou", "weight_rac", "rho_momentum")]
    + [{"rho": "off"}, {"rho": (0.1, 0.2, 0.3)}, {"difficulty_from": "last"}, {"detach_difficulty": True}]
    + [{"adw": False}, {"odw": False}],
)
def test_so_is_every_choice_of_the_loss(changes: dict[str, Any]) -> None:
    assert identity(Settings(loss=AttBalanceConfig(**changes))) != identity(Settings())


def test_the_name_of_a_record_says_what_it_is_of(tmp_path: Path) -> None:
    settings = Settings(data="builtin:refcoco-hard", seed=3)
    assert record_path(tmp_path, settings) == tmp_path / f"transvg-tiny_refcoco-hard_3_{identity(settings)}.json"
    own = Settings(data="../deep/own", data_root="folder")
    assert record_path(tmp_path, own).parent == tmp_path
    # A checkpoint's settings are the same run's.
    assert record_path(tmp_path, Settings.from_dict(json.loads(json.dumps(settings.to_dict())))) == record_path(
        tmp_path, settings
    )


def whole() -> dict[str, Any]:
    return {"format": FORMAT, **{item.name: getattr(RECORD, item.name) for item in fields(Record)}}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read as a record"),
        (b"", "cannot be read as a record"),
        (b'{"format": 1, "settings": {', "cannot be read as a record"),
        (b"\xff\xfe", "cannot be read as a record"),
        (b"[]", "cannot be read as a record"),
        (b'["format"]', "cannot be read as a record"),
        (b"3", "cannot be read as a record"),
        (b"null", "cannot be read as a record"),
        (b"{}", "does not say its format"),
        (json.dumps({**whole(), "format": FORMAT + 1}).encode(), f"of format {FORMAT + 1}; this version reads"),
        (json.dumps({**whole(), "more": 1}).encode(), "is no record: its fields are"),
        (
            json.dumps({**whole(), "results": {"fresh": {}}}).encode(),
            "is no record: results.fresh lacks acc50, acc70, by_",
        ),
        (json.dumps({**whole(), "results": {"fresh": 3}}).encode(), "is no record: results.fresh lacks everything"),
        (json.dumps({**whole(), "results": None}).encode(), "is no record: results lacks everything"),
        (json.dumps({**whole(), "curve": [{**POINT, "step": 1}]}).encode(), "is no record: curve[0] lacks seconds"),
        (json.dumps({"format": FORMAT, "settings": {}}).encode(), "is no record: its fields are settings"),
    ],
)
def test_what_is_no_record_is_named(content: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_record(path)
    assert str(raised.value).startswith(f"{path} ")
    assert says in str(raised.value)
    path.write_text(json.dumps(whole()))
    assert load_record(path) == RECORD
