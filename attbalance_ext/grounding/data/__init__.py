"""Grounding data: the built-in procedural benchmark, its vocabulary, statistics and export."""

from __future__ import annotations

from .attributes import VALUES
from .dataset import GroundingDataset, Objects, Sample, load_dataset
from .names import SPLITS, BuiltinName, UnknownData
from .vocabulary import Vocabulary

__all__ = [
    "SPLITS",
    "VALUES",
    "BuiltinName",
    "GroundingDataset",
    "Objects",
    "Sample",
    "UnknownData",
    "Vocabulary",
    "load_dataset",
]
