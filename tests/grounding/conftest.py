"""Fixtures of the trainer's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_toy import toy_trainer

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
