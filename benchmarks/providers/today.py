"""The terms as people compute them today, from the input of the host's `nn.MultiheadAttention`.

Per supervised layer: the key projection done again on the layer's input, attention weights of every head
materialised, the box painted on the image canvas and resized to the token grid, then the paper's formulas.
What the host itself loses by giving up fused attention is *not* charged here, nor is Spearman's rho.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.suites.op import CANVAS, HEADS, OpInputs
from benchmarks.task import Task


class Today:
    name = "today"
    title = "as done today (projection redone, weights and masks materialised)"

    def task(self, suite: str, inputs: OpInputs) -> Task | None:
        if suite != "op":
            return None
        students = [_Layer(q, k, i) for i, (q, k) in enumerate(zip(inputs.query, inputs.key, strict=True))]
        teachers = [
            _Layer(q, k, i) for i, (q, k) in enumerate(zip(inputs.teacher_query, inputs.teacher_key, strict=True))
        ]

        def forward() -> list[Tensor]:
            in_box, rac, mrc = [], [], []
            for index, layer in enumerate(students):
                log_p = layer.map().log_softmax(-1)
                inside = (log_p.exp() * paint(inputs.boxes, inputs.grids)).sum(-1)
                in_box.append(inside)
                rac.append(-2 * inside.log())  # -log(1 - A_out) is -log(A_in) with fewer digits
                if teachers:
                    with torch.no_grad():
                        t = teachers[index].map().softmax(-1)
                    mrc.append(F.kl_div(log_p, t, reduction="none").sum(-1))
            return [torch.stack(term) for term in (in_box, rac, mrc) if term]

        weights = [parameter for layer in students for parameter in layer.parameters()]
        return Task(forward, [*inputs.query, *inputs.key], weights)


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

    def map(self) -> Tensor:
        """(B, N): the mean over heads of q.k / sqrt(d), in fp32 at least."""
        batch, width = self.query.shape
        q = F.linear(self.query.to(self.weight), self.weight).view(batch, HEADS, 1, width // HEADS)
        k = F.linear(self.key, self.weight, self.bias).view(batch, -1, HEADS, width // HEADS).transpose(1, 2)
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(width // HEADS)  # (B, H, 1, N)
        return scores.mean(1).squeeze(1).to(self.query.dtype)


def paint(boxes: Tensor, grids: tuple[tuple[int, int], ...]) -> Tensor:
    """(B, N): 1 inside the box. Painted in whole pixels on the canvas, then resized to each grid, nearest pixel."""
    x, y, w, h = (boxes * CANVAS).unbind(-1)
    corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1).round().long()
    canvas = boxes.new_zeros(len(boxes), 1, CANVAS, CANVAS)
    for sample, (x0, y0, x1, y1) in enumerate(corners.tolist()):
        canvas[sample, :, y0:y1, x0:x1] = 1
    return torch.cat([F.interpolate(canvas, size=grid).flatten(1) for grid in grids], dim=1)
