"""Pretrained weights from a folder or the hub: of the design that is wanted, whole, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.hub import address

Model = TypeVar("Model", bound=PreTrainedModel)


def read_config(option: str, weights: str, model_type: str) -> Any:
    """The configuration at ``weights``: a folder, a hub id, or ``id@revision``; no code that lies there runs.

    Raises:
        UserError: there is none, or it is not of ``model_type``; the message names ``option``.
    """
    source, revision = address(weights)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise UserError(f"{option}: {weights!r} is no folder or hub id of a transformers model: {cause}") from None
    if config.model_type != model_type:
        raise UserError(f"{option}: {weights!r} is a {config.model_type} model; wanted: {model_type}")
    return config


def require_design(option: str, weights: str, config: PretrainedConfig, wanted: Mapping[str, Any]) -> None:
    """``UserError`` unless ``config`` has every value of ``wanted``."""
    for name, value in wanted.items():
        found = getattr(config, name, None)
        if found != value:
            raise UserError(f"{option}: {weights!r} has {name} {found!r}; this model wants {value!r}")


def load(option: str, weights: str, model_class: type[Model], config: PretrainedConfig, **options: Any) -> Model:
    """``model_class`` with float32 weights. What the checkpoint has besides (other heads) is left out.

    Raises:
        UserError: weights cannot be read, or some are missing: nothing is ever left random silently.
    """
    source, revision = address(weights)
    try:
        model, report = model_class.from_pretrained(
            source, revision=revision, config=config, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise UserError(f"{option}: the weights of {weights!r} cannot be read: {cause}") from None
    missing = sorted(report["missing_keys"])
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(f"{option}: {weights!r} lacks {len(missing)} of the model's weights: {names}")
    return model
