"""Suite `op`: the attention terms of L layers, unreduced, with gradients to query and key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attbalance_ext import BoxRegion, QueryAttention, attention_terms
from benchmarks.differentiable import run
from benchmarks.scenes import RULE, Grids, draw_boxes, grids_of
from benchmarks.task import MODES, Bytes, Results

HEADS = 8
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


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
    grids: Grids
    teacher_query: list[Tensor]  # empty without a teacher
    teacher_key: list[Tensor]

    @property
    def region(self) -> BoxRegion:
        return BoxRegion(self.boxes, self.grids, rule=RULE)

    @property
    def outputs(self) -> int:
        """How many of (in_box, rac, mrc) are asked for: mrc needs a teacher."""
        return 3 if self.teacher_key else 2

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {
            **{f"query {layer}": query for layer, query in enumerate(self.query)},
            **{f"key {layer}": key for layer, key in enumerate(self.key)},
        }

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Incoming gradients of in_box, rac and, with a teacher, mrc: (L, B) each, dense and random."""
        generator = torch.Generator().manual_seed(1)
        like = self.query[0]
        shape = (len(self.query), like.shape[0])
        names = ("in_box", "rac", "mrc")[: self.outputs]
        return {name: (torch.rand(shape, generator=generator) + 0.5).to(like) for name in names}

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
    case = OpCase
    defaults: Mapping[str, Sequence[Any]] = {"batch": (8, 32)}
    modes = MODES[:3]
    rounds, warmup = 30, 3
    baselines = ("eager",)

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
            boxes=draw_boxes(case.batch, grids, generator).to(device),
            grids=grids,
            teacher_query=[q.to(device, acc) for q, _ in near],
            teacher_key=[k.to(device, case.dtype) for _, k in near],
        )

    def truth(self, inputs: OpInputs) -> dict[str, Results]:
        exact = inputs.to(torch.float64)
        student, teacher = exact.student(), exact.teacher()
        gradients = {name: gradient.double() for name, gradient in inputs.gradients.items()}

        def forward() -> Sequence[Tensor]:
            return attention_terms(student, exact.region, teacher=teacher, backend="reference")[: inputs.outputs]

        return {"": run(forward, exact.leaves, gradients)}

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
