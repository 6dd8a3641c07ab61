"""Suite `op`: the attention terms of L layers, unreduced, with gradients to query and key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attbalance_ext import BoxRegion, QueryAttention, attention_terms
from benchmarks.task import Bytes, Truth

CANVAS = 640  # pixels a side: what the host models pad their images to
HEADS = 8
# Today's usual rasterisation keeps a cell when its corner pixel is inside the box. All providers are given that rule,
# so that all of them can be held to one truth; the other rules cost the same.
RULE = "nearest"
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class OpCase:
    """Shapes of one call. The defaults are TransVG's: 6 layers of 256 channels, 20 x 20 visual tokens."""

    layers: int = 6
    batch: int = 8
    tokens: int = 400
    width: int = 256
    dtype: torch.dtype = torch.float32
    teacher: bool = False

    def describe(self) -> dict[str, Any]:
        return {
            "L": self.layers,
            "B": self.batch,
            "N": self.tokens,
            "D": self.width,
            "dtype": str(self.dtype).removeprefix("torch."),
            "teacher": self.teacher,
        }


@dataclass(frozen=True)
class OpInputs:
    """Tensors of one case. query: L x (B, D) in fp32 (fp64 for fp64 keys), key: L x (B, N, D) in the case's dtype."""

    query: list[Tensor]
    key: list[Tensor]
    scale: float
    boxes: Tensor  # (B, 4) cxcywh in [0, 1], corners on whole pixels
    grids: tuple[tuple[int, int], ...]
    teacher_query: list[Tensor]  # empty without a teacher
    teacher_key: list[Tensor]

    @property
    def region(self) -> BoxRegion:
        return BoxRegion(self.boxes, self.grids, rule=RULE)

    @property
    def outputs(self) -> int:
        """How many of (in_box, rac, mrc) are asked for: mrc needs a teacher."""
        return 3 if self.teacher_key else 2

    def student(self) -> QueryAttention:
        return QueryAttention(query=self.query, key=self.key, scale=self.scale)

    def teacher(self) -> QueryAttention | None:
        if not self.teacher_key:
            return None
        return QueryAttention(query=self.teacher_query, key=self.teacher_key, scale=self.scale)

    def to(self, dtype: torch.dtype) -> OpInputs:
        """A copy with new leaves, query and key in `dtype`."""

        def leaves(tensors: list[Tensor]) -> list[Tensor]:
            return [t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad) for t in tensors]

        return OpInputs(
            leaves(self.query),
            leaves(self.key),
            self.scale,
            self.boxes,
            self.grids,
            leaves(self.teacher_query),
            leaves(self.teacher_key),
        )


class OpSuite:
    name = "op"

    def inputs(self, case: OpCase, device: torch.device) -> OpInputs:
        generator = torch.Generator().manual_seed(0)
        grids = grids_of(case.tokens)
        acc = torch.float64 if case.dtype == torch.float64 else torch.float32

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        # Unit-variance keys and a query that makes scores of standard deviation 2: neither flat nor one-hot.
        scale = 1 / (HEADS * math.sqrt(case.width / HEADS))
        size = 2 / (scale * math.sqrt(case.width))
        query = [size * normal(case.batch, case.width) for _ in range(case.layers)]
        key = [normal(case.batch, case.tokens, case.width) for _ in range(case.layers)]
        # A momentum teacher is the student a few steps ago.
        near = [
            (q + 0.1 * size * normal(*q.shape), k + 0.1 * normal(*k.shape)) for q, k in zip(query, key, strict=True)
        ]
        if not case.teacher:
            near = []
        return OpInputs(
            query=[q.to(device, acc).requires_grad_() for q in query],
            key=[k.to(device, case.dtype).requires_grad_() for k in key],
            scale=scale,
            boxes=_boxes(case.batch, grids, generator).to(device),
            grids=grids,
            teacher_query=[q.to(device, acc) for q, _ in near],
            teacher_key=[k.to(device, case.dtype) for _, k in near],
        )

    def gradients(self, inputs: OpInputs) -> list[Tensor]:
        """Incoming gradients of in_box, rac and, with a teacher, mrc: (L, B) each."""
        generator = torch.Generator().manual_seed(1)
        like = inputs.query[0]
        shape = (len(inputs.query), like.shape[0])
        return [(torch.rand(shape, generator=generator) + 0.5).to(like) for _ in range(inputs.outputs)]

    def truth(self, inputs: OpInputs) -> Truth:
        exact = inputs.to(torch.float64)
        terms = attention_terms(exact.student(), exact.region, teacher=exact.teacher(), backend="reference")
        outputs = terms[: inputs.outputs]
        gradients = [gradient.double() for gradient in self.gradients(inputs)]
        return Truth(
            [output.detach() for output in outputs],
            torch.autograd.grad(outputs, [*exact.query, *exact.key], gradients),
        )

    def bytes(self, case: OpCase) -> Bytes:
        """K once, the teacher's K once, dK once. Queries, boxes, scores and results are under 1 % of that."""
        keys = case.layers * case.batch * case.tokens * case.width * case.dtype.itemsize
        teachers = keys if case.teacher else 0
        size = f"L*B*N*D*{case.dtype.itemsize}"
        return Bytes(
            read=keys + teachers,
            write=keys,
            read_formula=f"K + K_teacher = 2*{size}" if case.teacher else f"K = {size}",
            write_formula=f"dK = {size}",
        )

    def floor(self, inputs: OpInputs) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        keys = [key.detach() for key in inputs.key]
        return [*keys, *inputs.teacher_key], [torch.empty_like(key) for key in keys]

    def tolerance(self, case: OpCase) -> float:
        return _TOLERANCE[case.dtype]


def grids_of(tokens: int) -> tuple[tuple[int, int], ...]:
    """The grids behind a token count: QRNet's 20 x 20 then 10 x 10 for 500, else the grid nearest to a square."""
    if tokens == 500:
        return ((20, 20), (10, 10))
    rows = next(r for r in range(math.isqrt(tokens), 0, -1) if tokens % r == 0)
    return ((rows, tokens // rows),)


def _boxes(batch: int, grids: tuple[tuple[int, int], ...], generator: torch.Generator) -> Tensor:
    """(B, 4) cxcywh in [0, 1]: corners on odd pixels of the canvas, at least one cell of every grid inside."""

    def interval(cells: int) -> tuple[Tensor, Tensor]:
        if cells == 1:
            return torch.zeros(batch), torch.ones(batch)
        least = min(-(-CANVAS // cells) + 2, CANVAS - 4)
        length = torch.randint(least, max(least + 1, CANVAS // 2), (batch,), generator=generator) // 2 * 2 + 2
        low = (torch.rand(batch, generator=generator) * (CANVAS - 2 - length)).long() // 2 * 2 + 1
        return low / CANVAS, (low + length) / CANVAS

    x0, x1 = interval(min(columns for _, columns in grids))
    y0, y1 = interval(min(rows for rows, _ in grids))
    return torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1).float()
