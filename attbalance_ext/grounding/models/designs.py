"""What is known about each model before it is built: where it is defined, and how its paper trains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Design:
    """``module`` has a function named after the model (``transvg-r50``: ``transvg_r50``)."""

    module: str
    bert: bool = False
    """Whether its text branch is BERT: sentences between special tokens, and a vocabulary of BERT's size at least."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Settings in which it is trained otherwise than ``Settings`` has it; ``loss.NAME`` for those of the loss."""


_PAPER = {
    "size": 640,
    "augment": True,
    "pretrain_steps": 0,
    "learning_rate": 1e-4,
    "vision_rate": 1e-5,
    "text_rate": 1e-5,
    "weight_decay": 1e-4,
    "warmup_steps": 0,
    "schedule": "step",
    "epochs": 90,
    "validate_every": 1000,
}
"""TransVG, section 4.2: AdamW, a tenth of the rate for what is pretrained, and of all rates after 60 of 90 epochs
(RefCOCO+: 120 of 180).

An epoch of RefCOCO has 1900 steps of 64; its validation split is as many samples as 170 steps."""

_TRANSVG = {**_PAPER, "clip": None}
_VLTVG = {
    **_PAPER,
    "clip": 0.1,
    "frozen_parts": ("vision", "text"),
    "frozen_fraction": 1 / 9,
    "terms_fraction": 1.0,
    "loss.alpha_l1": 5.0,
    "loss.alpha_giou": 2.0,
}
"""VLTVG: pretrained parts frozen for 10 of 90 epochs, L1 x 5 and GIoU x 2 on every stage; the terms never go off."""
_QRNET_TINY = {"vision_rate": 3e-4}
"""A tenth, as in the paper: each step on what predicts a gate's weights is felt by all of them at once."""
_VLTVG_TINY = {"loss.alpha_l1": 5.0, "loss.alpha_giou": 2.0, "terms_fraction": 1.0}

MODELS: dict[str, Design] = {
    "transvg-tiny": Design("transvg_tiny"),
    "transvg-r50": Design("transvg", bert=True, recipe=_TRANSVG),
    "transvg-r101": Design("transvg", bert=True, recipe=_TRANSVG),
    "vltvg-tiny": Design("vltvg_tiny", recipe=_VLTVG_TINY),
    "vltvg-r50": Design("vltvg", bert=True, recipe=_VLTVG),
    "vltvg-r101": Design("vltvg", bert=True, recipe=_VLTVG),
    "qrnet-tiny": Design("qrnet_tiny", recipe=_QRNET_TINY),
    "qrnet-swin-s": Design("qrnet", bert=True, recipe=_TRANSVG),
}
