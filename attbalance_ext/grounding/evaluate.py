"""How good a model is on a split, and where its object query looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attbalance_ext import AttBalanceLoss, BoxRegion, QueryAttention, attention_map, attention_terms, spearman_rho
from attbalance_ext.grounding.batch import Batch
from attbalance_ext.grounding.distributed import ALONE, Ranks
from attbalance_ext.grounding.models import GroundingModel
from attbalance_ext.grounding.split import Split


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

    @classmethod
    def joined(cls, parts: Sequence[Evaluation]) -> Evaluation:
        """The samples of ``parts``, in order."""
        return cls(
            torch.cat([part.boxes for part in parts]),
            torch.cat([part.iou for part in parts]),
            torch.cat([part.in_box for part in parts], dim=1),
            torch.cat([part.valid for part in parts]),
        )

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
    model: GroundingModel,
    split: Split,
    *,
    rule: str = "touch",
    backend: str = "auto",
    samples: int | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Run ``model`` over ``split`` in evaluation mode; the model's mode is put back afterwards.

    Args:
        samples: look at so many, evenly spaced; None: at all.
        ranks: each process looks at a part, and every process gets the whole evaluation.
    """
    criterion = AttBalanceLoss(backend=backend)
    chosen = torch.arange(len(split))
    if samples is not None and samples < len(split):
        chosen = torch.arange(samples) * len(split) // samples
    share = ranks.share(chosen)
    found = [Evaluation(torch.empty(0, 4), torch.empty(0), torch.empty(model.layers, 0), torch.empty(0).bool())]
    for batch, predicted, attention in _walk(model, split, share.split(split.evaluation_batch) if len(share) else ()):
        terms = attention_terms(attention, BoxRegion(batch.boxes, model.grids, rule), backend=backend)
        iou = criterion(None, predicted, batch.boxes).iou
        found.append(Evaluation(predicted.cpu(), iou.cpu(), terms.in_box.cpu(), terms.valid.cpu()))
    return Evaluation.joined(ranks.gather(Evaluation.joined(found)))


@torch.no_grad()
def attention_pictures(model: GroundingModel, split: Split, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The supervised map of every fusion layer (L, n, N) and the predicted boxes (n, 4) of some samples."""
    ((_, boxes, attention),) = _walk(model, split, [indices])
    return attention_map(attention).cpu(), boxes.cpu()


def _walk(
    model: GroundingModel, split: Split, batches: Sequence[Tensor]
) -> Iterator[tuple[Batch, Tensor, QueryAttention]]:
    """(batch, predicted boxes of the last stage, attention of every layer) for each batch of indices."""
    training = model.training
    model.eval()
    tap = model.make_tap(every_layer=True)
    try:
        for batch in split.stream((indices, None) for indices in batches):
            with tap.recording():
                predicted = model(*batch.inputs)
            yield batch, predicted if predicted.dim() == 2 else predicted[-1], tap.attention()
    finally:
        tap.remove()
        model.train(training)
