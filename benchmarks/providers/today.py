"""The two ops as people do them today, on inputs that a fused op would be given.

In suite `op`, per supervised layer: the key projection done again on the layer's input, the scores of every head
materialised, then the paper's formulas on the painted box. What the host itself loses by giving up fused attention is
*not* charged here, nor is Spearman's rho: those are in suites `tap` and `tail`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.differentiable import differentiable
from benchmarks.suites.op import HEADS, OpInputs
from benchmarks.suites.tail import TailInputs
from benchmarks.task import Task
from benchmarks.today.masks import paint
from benchmarks.today.objective import objective
from benchmarks.today.terms import attention_terms, head_average


def op(inputs: OpInputs) -> Task:
    students = [_Layer(q, k, i) for i, (q, k) in enumerate(zip(inputs.query, inputs.key, strict=True))]
    teachers = [_Layer(q, k, i) for i, (q, k) in enumerate(zip(inputs.teacher_query, inputs.teacher_key, strict=True))]

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            theirs = [layer.scores() for layer in teachers]
        mask = paint(inputs.boxes, inputs.grids)
        return attention_terms([layer.scores() for layer in students], mask, theirs)

    weights = [parameter for layer in students for parameter in layer.parameters()]
    return differentiable(forward, inputs.leaves, inputs.gradients, weights)


def tail(inputs: TailInputs) -> Task:
    def forward() -> Sequence[Tensor]:
        return [objective(inputs.in_box, inputs.rac, inputs.mrc, inputs.predicted, inputs.target)]

    return differentiable(forward, inputs.leaves, inputs.gradients)


class _Layer(nn.Module):
    """One host layer: its input, its projections, and the pre-softmax map averaged over heads.

    The suite's query is already u = W_k^T W_q x (the projection-free form). An orthogonal W_k takes it back to the
    projected query, q = W_k u, so that heads, scores and gradients are exactly the suite's.
    """

    def __init__(self, query: Tensor, key: Tensor, seed: int) -> None:
        super().__init__()
        width = query.shape[-1]
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q
        self.query, self.key = query, key
        self.weight = nn.Parameter(basis.to(key))
        self.bias = nn.Parameter(torch.zeros_like(self.weight[0]))

    def scores(self) -> Tensor:
        """(B, N): the mean over heads of q.k / sqrt(d)."""
        q = F.linear(self.query.to(self.weight), self.weight).unflatten(1, (HEADS, 1, -1))
        k = F.linear(self.key, self.weight, self.bias).unflatten(2, (HEADS, -1)).transpose(1, 2)
        return head_average(q, k)
