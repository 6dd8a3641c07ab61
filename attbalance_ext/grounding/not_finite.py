"""A step whose loss or gradient is not finite: which one it was, and its batch, kept for inspection."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from attbalance_ext.grounding.files import save_checkpoint
from attbalance_ext.grounding.split import Split


def weights_not_finite(model: nn.Module) -> list[str]:
    """Names of the floating-point weights of which some are not finite. Waits for the device, once."""
    weights = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    finite = torch.stack([value.isfinite().all() for value in weights.values()]).tolist()
    return [name for name, whole in zip(weights, finite, strict=True) if not whole]


def keep_batch(path: Path, split: Split, parts: Iterable[Tensor], *, step: int, epoch: int, names: list[str]) -> None:
    """Write the batch of ``step`` to ``path``, made again from its indices: the bits that the step saw.

    The file has tensors and plain types only. ``parts``: the indices of every process's every part. ``names``: of the
    values that were not finite.
    """
    kept = list(parts)
    indices = torch.cat(kept).tolist()
    pictures = split.pictures
    batches = [
        {name: value if value is None else value.cpu() for name, value in vars(batch).items()}
        for batch in split.stream((part, epoch) for part in kept)
    ]
    save_checkpoint(
        path,
        {
            "step": step,
            "epoch": epoch,
            "not_finite": names,
            "indices": indices,
            "sentences": [pictures.sentences[index] for index in indices],
            "pictures": [str(pictures.picture_key(index)) for index in indices],
            "batches": batches,
        },
    )
