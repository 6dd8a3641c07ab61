"""Grounding models by name."""

from __future__ import annotations

import importlib
from typing import Any

from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.models.base import PARTS, GroundingModel, ObjectAttention
from attbalance_ext.grounding.models.designs import MODELS, Design


def design(name: str) -> Design:
    """What is known about the model called ``name``; an unknown name raises ``UserError``."""
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; there is: {', '.join(MODELS)}")
    return MODELS[name]


def build_model(name: str, *, vocabulary_size: int, image_size: int, **options: Any) -> GroundingModel:
    """The model called ``name``, with fresh weights from torch's global generator.

    ``options`` go to the model's own constructor. ``UserError``: an unknown name, options that it does not take, or a
    package that is not installed.
    """
    chosen = design(name)
    try:
        module = importlib.import_module(f"attbalance_ext.grounding.models.{chosen.module}")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise UserError(f"{name} needs transformers: pip install 'attbalance_ext[transformers]'") from None
    factory = getattr(module, name.replace("-", "_"))
    return factory(vocabulary_size=vocabulary_size, image_size=image_size, **options)


__all__ = ["MODELS", "PARTS", "Design", "GroundingModel", "ObjectAttention", "build_model", "design"]
