"""Grounding data: the built-in procedural benchmark, its vocabulary, statistics and export."""

from __future__ import annotations

from .attributes import VALUES
from .cards import card
from .dataset import GroundingDataset, Objects, Sample, load_dataset
from .formats import FORMATS, export
from .names import SPLITS, BuiltinName, UnknownData
from .vocabulary import Vocabulary

__all__ = [
    "FORMATS",
    "SPLITS",
    "VALUES",
    "BuiltinName",
    "GroundingDataset",
    "Objects",
    "Sample",
    "UnknownData",
    "Vocabulary",
    "card",
    "export",
    "load_dataset",
]
