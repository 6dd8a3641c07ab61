"""Fixtures of the trainer's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_toy import ToyDataset, toy_settings

from attbalance_ext.grounding.data import Vocabulary
from attbalance_ext.grounding.models import build_model
from attbalance_ext.grounding.split import PreparedSplit
from attbalance_ext.grounding.train import Trainer


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer on the toy problem; settings by keyword."""

    def make(directory: str = "run", *, scenes: int = 16, **changes: Any) -> Trainer:
        settings = toy_settings(**changes)
        dataset = ToyDataset(scenes)
        vocabulary = Vocabulary.build(dataset.sentences)
        torch.manual_seed(settings.seed)
        model = build_model(settings.model, vocabulary_size=len(vocabulary), image_size=32, **settings.model_options)
        split = PreparedSplit(dataset, vocabulary, model, torch.device("cpu"))
        return Trainer(settings, model, split, split, tmp_path / directory)

    return make


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of generated data for all tests of a worker."""
    return tmp_path_factory.mktemp("cache")
