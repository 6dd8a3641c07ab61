"""Liger-Kernel's KL divergence for MRC, on top of PyTorch's scores and softmax: the closest thing it has to the op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.differentiable import differentiable
from benchmarks.suites.op import OpInputs
from benchmarks.task import Task


def op(inputs: OpInputs) -> Task | None:
    if not inputs.teacher_key:
        return None  # without a teacher there is nothing of it to use
    from liger_kernel.transformers import LigerKLDIVLoss  # optional: without it this provider is unavailable

    divergence = LigerKLDIVLoss(reduction="none", log_target=True)

    def log_softmax(query: Sequence[Tensor], key: Sequence[Tensor]) -> Tensor:
        """(L, B, N), in the queries' dtype."""
        scores = [torch.einsum("bd,bnd->bn", q, k.to(q.dtype)) for q, k in zip(query, key, strict=True)]
        return (inputs.scale * torch.stack(scores)).log_softmax(-1)

    def forward() -> Sequence[Tensor]:
        log_p = log_softmax(inputs.query, inputs.key)
        log_t = log_softmax(inputs.teacher_query, inputs.teacher_key)
        in_box = (log_p.exp() * inputs.region.mask()).sum(-1)
        mrc = divergence(log_p.flatten(0, 1), log_t.flatten(0, 1)).sum(-1)
        return [in_box, -2 * in_box.log(), mrc.view_as(in_box)]

    return differentiable(forward, inputs.leaves, inputs.gradients)
