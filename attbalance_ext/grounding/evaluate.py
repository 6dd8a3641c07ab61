"""How good a model is on a split, and where its object query looks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attbalance_ext import AttBalanceLoss, BoxRegion, QueryAttention, attention_map, attention_terms, spearman_rho
from attbalance_ext.grounding.models import GroundingModel
from attbalance_ext.grounding.split import Batch, PreparedSplit


@dataclass(frozen=True)
class Evaluation:
    """Predictions of one model on one split, sample by sample, on the CPU."""

    boxes: Tensor
    """(n, 4) predicted, cxcywh."""
    iou: Tensor
    """(n,) with the true box."""
    in_box: Tensor
    """(L, n) attention of the object query inside the true box, for every fusion layer, supervised or not."""
    valid: Tensor
    """(n,) bool: False where the box covers no visual token."""

    def accuracy(self, threshold: float = 0.5) -> float:
        """Part of the samples with IoU >= ``threshold``."""
        return (self.iou >= threshold).float().mean().item()

    def metrics(self) -> dict[str, Any]:
        """The figures of merit, as plain types."""
        return {
            "samples": len(self.iou),
            "acc50": self.accuracy(0.5),
            "acc70": self.accuracy(0.7),
            "miou": self.iou.mean().item(),
            "in_box": self.in_box[:, self.valid].mean(1).tolist(),
            "rho": spearman_rho(self.in_box, self.iou, self.valid).tolist(),
        }


@torch.no_grad()
def evaluate(
    model: GroundingModel, split: PreparedSplit, *, rule: str = "touch", backend: str = "auto", batch_size: int = 256
) -> Evaluation:
    """Run ``model`` over ``split`` in evaluation mode; the model's mode is put back afterwards."""
    criterion = AttBalanceLoss(backend=backend)
    boxes, iou, in_box, valid = [], [], [], []
    for batch, predicted, attention in _walk(model, split, split.batches(batch_size)):
        terms = attention_terms(attention, BoxRegion(batch.boxes, model.grids, rule), backend=backend)
        boxes.append(predicted)
        iou.append(criterion(None, predicted, batch.boxes).iou)
        in_box.append(terms.in_box)
        valid.append(terms.valid)
    return Evaluation(torch.cat(boxes).cpu(), torch.cat(iou).cpu(), torch.cat(in_box, 1).cpu(), torch.cat(valid).cpu())


@torch.no_grad()
def attention_pictures(model: GroundingModel, split: PreparedSplit, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The supervised map of every fusion layer (L, n, N) and the predicted boxes (n, 4) of some samples."""
    ((_, boxes, attention),) = _walk(model, split, [indices])
    return attention_map(attention).cpu(), boxes.cpu()


def _walk(
    model: GroundingModel, split: PreparedSplit, batches: list[Tensor]
) -> Iterator[tuple[Batch, Tensor, QueryAttention]]:
    """(batch, predicted boxes of the last stage, attention of every layer) for each batch of indices."""
    training = model.training
    model.eval()
    tap = model.make_tap(every_layer=True)
    try:
        for indices in batches:
            batch = split.batch(indices)
            with tap.recording():
                predicted = model(*batch.inputs)
            yield batch, predicted if predicted.dim() == 2 else predicted[-1], tap.attention()
    finally:
        tap.remove()
        model.train(training)
