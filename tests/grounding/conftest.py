"""Fixtures of the trainer's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_command import FEW_SCENES, call
from helpers_faults import OPTIONS
from helpers_toy import toy_trainer

from attbalance_ext.grounding.data.generate import SCENES
from attbalance_ext.grounding.train import Trainer


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer on the toy problem in a folder of this test; settings by keyword."""

    def make(directory: str = "run", **changes: Any) -> Trainer:
        return toy_trainer(tmp_path / directory, **changes)

    return make


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of generated data for all tests of a worker."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """The built-in data are small, and lie in this worker's cache."""
    _use_few_scenes(monkeypatch, cache)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run by ``helpers_faults.OPTIONS`` that nothing befell: checkpoints at steps 4, 8 and 12. To be copied."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        _use_few_scenes(monkeypatch, cache)
        assert call("train", "--out", folder, *OPTIONS) == 0
    return folder


def _use_few_scenes(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    for split, scenes in FEW_SCENES.items():
        monkeypatch.setitem(SCENES, split, scenes)
    monkeypatch.setenv("ATTBALANCE_CACHE", str(cache))
