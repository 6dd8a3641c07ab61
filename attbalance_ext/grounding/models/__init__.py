"""Grounding models by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.models.base import GroundingModel
from attbalance_ext.grounding.models.transvg import transvg_tiny

MODELS: dict[str, Callable[..., GroundingModel]] = {"transvg-tiny": transvg_tiny}


def build_model(name: str, *, vocabulary_size: int, image_size: int, **options: Any) -> GroundingModel:
    """The model called ``name``, with fresh weights from torch's global generator.

    ``options`` go to the model's own constructor. An unknown name raises ``UserError``.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; there is: {', '.join(MODELS)}")
    return MODELS[name](vocabulary_size=vocabulary_size, image_size=image_size, **options)


__all__ = ["MODELS", "GroundingModel", "build_model"]
