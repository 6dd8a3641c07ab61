"""Grounding data: the built-in procedural benchmark, its vocabulary, statistics and export, and data in files."""

from __future__ import annotations

from .annotations import Annotation, Box
from .attributes import VALUES
from .cards import card
from .dataset import GroundingDataset, Objects, Sample, load_dataset
from .files import FileDataset, open_dataset
from .formats import FORMATS, export
from .names import FRESH_SPLITS, SPLITS, BuiltinName, UnknownData
from .protocol import Pictures
from .vocabulary import Vocabulary

__all__ = [
    "FORMATS",
    "FRESH_SPLITS",
    "SPLITS",
    "VALUES",
    "Annotation",
    "Box",
    "BuiltinName",
    "FileDataset",
    "GroundingDataset",
    "Objects",
    "Pictures",
    "Sample",
    "UnknownData",
    "Vocabulary",
    "card",
    "export",
    "load_dataset",
    "open_dataset",
]
