"""Every test here starts with nothing compiled; the reference trainer on a few scenes of the built-in data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_compile import fresh_compiler

from attbalance_ext.grounding.data.generate import SCENES
from attbalance_ext.grounding.runs import start_run
from attbalance_ext.grounding.settings import Settings
from attbalance_ext.grounding.train import Trainer

FEW_SCENES = {"train": 60, "val": 4, "test": 4, "test_novel": 4}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    with fresh_compiler():
        yield


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of generated data for all tests of a worker."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """A trainer of transvg-tiny on builtin:refcoco in a folder of this test; settings by keyword."""
    for split, scenes in FEW_SCENES.items():
        monkeypatch.setitem(SCENES, split, scenes)
    made: list[Trainer] = []

    def make(**changes: Any) -> Trainer:
        defaults: dict[str, Any] = {"batch_size": 8, "pretrain_steps": 0, "terms_fraction": 1.0, "warmup_steps": 5}
        directory = tmp_path / f"run{len(made)}"
        made.append(start_run(Settings(**{**defaults, **changes}), directory, cache=cache))
        return made[-1]

    return make
