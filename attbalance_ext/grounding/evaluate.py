"""How good a model is on a split, and where its object query looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from attbalance_ext import AttBalanceLoss, BoxRegion, QueryAttention, attention_map, attention_terms, spearman_rho
from attbalance_ext.grounding.batch import Batch
from attbalance_ext.grounding.distributed import ALONE, Ranks
from attbalance_ext.grounding.models import GroundingModel
from attbalance_ext.grounding.split import Split
from attbalance_ext.grounding.used_attention import UsedAttention


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
    box_ratio: Tensor
    """(n,) true box area / image area."""
    used: Tensor
    """(L, n) of the attention that the network itself uses (``used_attention.py``): the part inside the true box."""
    used_visual: Tensor
    """(L, n) of the same: the part on visual tokens; the rest is on the words."""

    @classmethod
    def joined(cls, parts: Sequence[Evaluation]) -> Evaluation:
        """The samples of ``parts``, in order."""
        names = [item.name for item in fields(cls)]
        return cls(**{n: torch.cat([getattr(part, n) for part in parts], 0 if n == "boxes" else -1) for n in names})

    @classmethod
    def empty(cls, layers: int) -> Evaluation:
        one, several = torch.empty(0), torch.empty(layers, 0)
        return cls(torch.empty(0, 4), one, several, one.bool(), one, several, several)

    def accuracy(self, threshold: float = 0.5) -> float:
        """Part of the samples with IoU >= ``threshold``."""
        return (self.iou >= threshold).float().mean().item()

    def metrics(self) -> dict[str, Any]:
        """The figures of merit, as plain types."""
        return {
            "samples": len(self.iou),
            "valid": int(self.valid.sum()),
            "acc50": self.accuracy(0.5),
            "acc70": self.accuracy(0.7),
            "miou": self.iou.mean().item(),
            "in_box": self.in_box[:, self.valid].mean(1).tolist(),
            "rho": spearman_rho(self.in_box, self.iou, self.valid).tolist(),
            "used_in_box": self.used[:, self.valid].mean(1).tolist(),
            "used_visual": self.used_visual[:, self.valid].mean(1).tolist(),
        }

    def accuracy_by_size(self, threshold: float = 0.5) -> dict[str, float]:
        """Part of the samples with IoU >= ``threshold`` among the third with the smallest true boxes, and so on."""
        order = self.box_ratio.argsort(stable=True)
        hit = (self.iou >= threshold).float()
        thirds = zip(("small", "medium", "large"), order.tensor_split(3), strict=True)
        return {name: hit[third].mean().item() for name, third in thirds}


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
    found = [Evaluation.empty(model.layers)]
    batches = share.split(split.evaluation_batch) if len(share) else ()
    for batch, predicted, attention, used in _walk(model, split, batches):
        region = BoxRegion(batch.boxes, model.grids, rule)
        terms = attention_terms(attention, region, backend=backend)
        values = {
            "boxes": predicted,
            "iou": criterion(None, predicted, batch.boxes).iou,
            "in_box": terms.in_box,
            "valid": terms.valid,
            "box_ratio": batch.box_ratio,
            "used": (used * region.mask()).sum(-1),
            "used_visual": used.sum(-1),
        }
        found.append(Evaluation(**{name: value.cpu() for name, value in values.items()}))
    return Evaluation.joined(ranks.gather(Evaluation.joined(found)))


@torch.no_grad()
def attention_pictures(model: GroundingModel, split: Split, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The supervised map of every fusion layer (L, n, N) and the predicted boxes (n, 4) of some samples."""
    ((_, boxes, attention, _used),) = _walk(model, split, [indices])
    return attention_map(attention).cpu(), boxes.cpu()


def _walk(
    model: GroundingModel, split: Split, batches: Sequence[Tensor]
) -> Iterator[tuple[Batch, Tensor, QueryAttention, Tensor]]:
    """(batch, boxes of the last stage, supervised map of every layer, attention used) for each batch of indices."""
    training = model.training
    model.eval()
    tap, used = model.make_tap(every_layer=True), UsedAttention(model)
    try:
        for batch in split.stream((indices, None) for indices in batches):
            with tap.recording(), used.recording():
                predicted = model(*batch.inputs)
            yield batch, predicted if predicted.dim() == 2 else predicted[-1], tap.attention(), used.weights()
    finally:
        tap.remove()
        model.train(training)
