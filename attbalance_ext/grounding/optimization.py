"""Which parameters learn, how fast, and when."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.models import GroundingModel
from attbalance_ext.grounding.settings import Settings


def make_optimizer(model: GroundingModel, settings: Settings) -> torch.optim.AdamW:
    """AdamW with a group, of the part's name and learning rate, for each part of ``model`` that trains.

    What a rate of 0 freezes gets no gradient and is in no group.
    """
    rates = {"vision": settings.vision_rate, "text": settings.text_rate, "fusion": None}
    groups = []
    for name, parameters in model.parts().items():
        rate = settings.learning_rate if rates[name] is None else rates[name]
        if not rate:
            for parameter in parameters:
                parameter.requires_grad_(False)
        elif parameters:
            groups.append({"params": parameters, "lr": rate, "name": name})
    if not groups:
        raise UserError("learning_rate: nothing trains, every part of the model has a rate of 0")
    if {group["name"] for group in groups} <= frozen_parts(settings, 0):
        raise UserError(f"frozen_parts: nothing trains at first, {', '.join(settings.frozen_parts)} are all there is")
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay)


def learning_rate_schedule(settings: Settings) -> Callable[[int], float]:
    """The factor of all learning rates at a step: linear warm-up, then cosine to zero, or a drop to a tenth."""

    def factor(step: int) -> float:
        if step < settings.warmup_steps:
            return (step + 1) / settings.warmup_steps
        if settings.schedule == "step":
            return 1.0 if step < round(settings.drop_fraction * settings.steps) else 0.1
        progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


def frozen_parts(settings: Settings, step: int) -> frozenset[str]:
    """The parts that do not train at ``step``."""
    return frozenset(settings.frozen_parts if step < settings.frozen_steps else ())
