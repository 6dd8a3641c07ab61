"""Suite `tap`: AttBalance on a whole fusion stack, with gradients to its input and all its parameters.

The stack's output stands for the host's own loss: a dense, random gradient comes back to it. So `plain` costs what the
host costs without attention terms, and what the terms add is seen against it. The teacher's part is given: what its
forward pass costs is in suite `step`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attbalance_ext import AttentionTap, BoxRegion, QueryAttention, attention_terms
from benchmarks.differentiable import run
from benchmarks.scenes import RULE, Grids, draw_boxes, draw_pixel_padding, draw_word_padding, grids_of, token_padding
from benchmarks.suites.stack import FusionStack
from benchmarks.task import Results
from benchmarks.today.host import Heads, TodaysHost
from benchmarks.watch import Watch

# Six layers of bfloat16 leave gradients a tenth and more from the float64 ones, without any attention terms.
_TOLERANCE = {"fp32": 1e-4, "bf16": 0.25}
PRECISIONS = tuple(_TOLERANCE)


@dataclass(frozen=True)
class TapCase:
    """The defaults are TransVG's. dropout: of the host; with it PyTorch's CPU kernels have no fused attention."""

    batch: int = 8
    layers: int = 6
    words: int = 20
    tokens: int = 400
    width: int = 256
    heads: int = 8
    hidden: int = 2048
    dropout: float = 0.0
    precision: str = "fp32"
    teacher: bool = False

    def describe(self) -> dict[str, Any]:
        return {
            "L": self.layers,
            "B": self.batch,
            "T": self.words,
            "N": self.tokens,
            "D": self.width,
            "heads": self.heads,
            "hidden": self.hidden,
            "dropout": self.dropout,
            "precision": self.precision,
            "teacher": self.teacher,
        }


class Teacher(NamedTuple):
    """What a teacher's forward pass leaves of each layer, precomputed: to a tap, and to one who projects again."""

    attention: QueryAttention
    heads: list[Heads]


@dataclass(frozen=True)
class TapInputs:
    """One batch for the stack. tokens (S, B, D) is a leaf, like the stack's parameters."""

    case: TapCase
    stack: FusionStack
    tokens: Tensor
    positions: Tensor  # (S, 1, D)
    padding: Tensor  # (B, S) bool, True = ignore
    boxes: Tensor  # (B, 4)
    grids: Grids
    teacher: Teacher | None
    watch: Watch = field(default_factory=Watch)

    @property
    def visual(self) -> slice:
        return slice(1 + self.case.words, None)

    @property
    def region(self) -> BoxRegion:
        return BoxRegion(self.boxes, self.grids, rule=RULE)

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"tokens": self.tokens, **dict(self.stack.named_parameters())}

    @property
    def plain_gradients(self) -> dict[str, Tensor]:
        """The incoming gradient of the stack's output (S, B, D)."""
        generator = torch.Generator().manual_seed(1)
        return {"output": torch.randn(self.tokens.shape, generator=generator).to(self.tokens)}

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The same, and those of the terms, (L, B) each, large enough to show in every gradient."""
        generator = torch.Generator().manual_seed(2)
        names = ("in_box", "rac", "mrc") if self.case.teacher else ("in_box", "rac")
        shape = (self.case.layers, self.case.batch)
        terms = {name: 10 * (torch.rand(shape, generator=generator) + 0.5).to(self.tokens) for name in names}
        return {**self.plain_gradients, **terms}

    def tap(self) -> AttentionTap:
        return AttentionTap(self.stack.attention_layers(), query=0, visual=self.visual)

    def autocast(self) -> AbstractContextManager[None]:
        if self.case.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.tokens.device.type, torch.bfloat16)

    def double(self) -> TapInputs:
        """The same numbers in fp64, as new leaves, without dropout."""
        return replace(
            self,
            stack=copy.deepcopy(self.stack).double().eval(),
            tokens=self.tokens.detach().double().requires_grad_(),
            positions=self.positions.double(),
            teacher=self.teacher and Teacher(_double(self.teacher.attention), self.teacher.heads),
            watch=Watch(),
        )


class TapSuite:
    name = "tap"
    case = TapCase
    defaults: Mapping[str, Sequence[Any]] = {"teacher": (False, True)}
    modes = ("both",)
    rounds, warmup = 15, 1
    baselines = ("plain", "today")

    def inputs(self, case: TapCase, device: torch.device) -> TapInputs:
        generator = torch.Generator().manual_seed(0)
        grids = grids_of(case.tokens)
        boxes = draw_boxes(case.batch, grids, generator)
        count = 1 + case.words + case.tokens
        padding = torch.cat(
            [
                torch.zeros(case.batch, 1, dtype=torch.bool),
                draw_word_padding(case.batch, case.words, generator),
                token_padding(draw_pixel_padding(boxes, generator), grids),
            ],
            dim=1,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            stack = FusionStack(
                layers=case.layers, width=case.width, heads=case.heads, hidden=case.hidden, dropout=case.dropout
            )
        for layer in stack.attention_layers():  # PyTorch's own weights leave attention flat: scores around 0.1
            with torch.no_grad():
                layer.in_proj_weight[: 2 * case.width] *= 3
        inputs = TapInputs(
            case=case,
            stack=stack.to(device),
            tokens=torch.randn(count, case.batch, case.width, generator=generator).to(device).requires_grad_(),
            positions=torch.randn(count, 1, case.width, generator=generator).to(device),
            padding=padding.to(device),
            boxes=boxes.to(device),
            grids=grids,
            teacher=None,
        )
        return replace(inputs, teacher=_recorded_teacher(inputs)) if case.teacher else inputs

    def truth(self, inputs: TapInputs) -> dict[str, Results]:
        exact = inputs.double()

        def plain() -> Sequence[Tensor]:
            return [exact.stack(exact.tokens, exact.positions, exact.padding)]

        def complete() -> Sequence[Tensor]:
            tap = exact.tap()
            with tap.recording():
                output = exact.stack(exact.tokens, exact.positions, exact.padding)
            teacher = exact.teacher and exact.teacher.attention
            terms = attention_terms(tap.attention(), exact.region, teacher=teacher, backend="reference")
            tap.remove()
            return [output, *terms[: len(inputs.gradients) - 1]]

        def of(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: gradient.double() for name, gradient in gradients.items()}

        return {
            "plain": run(plain, exact.leaves, of(inputs.plain_gradients)),
            "terms": run(complete, exact.leaves, of(inputs.gradients)),
        }

    def bytes(self, case: TapCase) -> None:
        return None  # matrix products

    def floor(self, inputs: TapInputs) -> None:
        return None

    def tolerance(self, case: TapCase) -> float:
        return _TOLERANCE[case.precision]


@torch.no_grad()
def _recorded_teacher(inputs: TapInputs) -> Teacher:
    """The student a few steps ago: its weights, a twentieth of their size away."""
    stack = copy.deepcopy(inputs.stack).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in stack.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.add_(0.05 * parameter.std() * noise)
    layers = stack.attention_layers()
    tap = AttentionTap(layers, query=0, visual=inputs.visual)
    host = TodaysHost(layers, inputs.visual, materialise=False)
    with tap.recording():
        stack(inputs.tokens, inputs.positions, inputs.padding)
    return Teacher(tap.attention(), host.heads())


def _double(attention: QueryAttention) -> QueryAttention:
    return QueryAttention([q.double() for q in attention.query], [k.double() for k in attention.key], attention.scale)
