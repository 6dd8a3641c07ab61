"""Suite `tail`: the AttBalance objective on given terms, with gradients to the terms and the predicted boxes.

Everything here is B-sized: what counts is launches, host time and the trip to the CPU that SciPy's rho takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attbalance_ext import AttBalanceLoss, AttentionTerms
from benchmarks.boxes import box_iou
from benchmarks.differentiable import run
from benchmarks.scenes import draw_boxes, grids_of
from benchmarks.task import MODES, Bytes, Results

_LEAST_GAP = 1e-5


@dataclass(frozen=True)
class TailCase:
    layers: int = 6
    batch: int = 64

    def describe(self) -> dict[str, Any]:
        return {"L": self.layers, "B": self.batch}


@dataclass(frozen=True)
class TailInputs:
    """in_box, rac, mrc: (L, B). predicted, target: (B, 4) cxcywh. rac, mrc and predicted are leaves."""

    in_box: Tensor
    rac: Tensor
    mrc: Tensor
    predicted: Tensor
    target: Tensor

    @property
    def terms(self) -> AttentionTerms:
        valid = torch.ones_like(self.in_box[0], dtype=torch.bool)
        return AttentionTerms(self.in_box, self.rac, self.mrc, valid)

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"rac": self.rac, "mrc": self.mrc, "predicted": self.predicted}

    @property
    def gradients(self) -> dict[str, Tensor]:
        return {"loss": self.rac.new_tensor(0.7)}  # not 1, which a backward pass may take a short cut for

    def double(self) -> TailInputs:
        """The same bits in fp64, as new leaves."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().double().requires_grad_()

        return TailInputs(
            self.in_box.double(), leaf(self.rac), leaf(self.mrc), leaf(self.predicted), self.target.double()
        )


class TailSuite:
    name = "tail"
    case = TailCase
    defaults: Mapping[str, Sequence[Any]] = {"batch": (8, 64, 512, 4096)}
    modes = MODES[:3]
    rounds, warmup = 30, 3
    baselines = ("eager",)

    def inputs(self, case: TailCase, device: torch.device) -> TailInputs:
        generator = torch.Generator().manual_seed(0)
        in_box = torch.rand(case.layers, case.batch, generator=generator) * 0.9 + 0.05
        mrc = torch.rand(case.layers, case.batch, generator=generator)
        target = draw_boxes(case.batch, grids_of(400), generator)
        return TailInputs(
            in_box=in_box.to(device),
            rac=(-2 * in_box.log()).to(device).requires_grad_(),
            mrc=mrc.to(device).requires_grad_(),
            predicted=_predictions(target, generator).to(device).requires_grad_(),
            target=target.to(device),
        )

    def truth(self, inputs: TailInputs) -> dict[str, Results]:
        exact = inputs.double()
        gradients = {name: gradient.double() for name, gradient in inputs.gradients.items()}
        criterion = AttBalanceLoss(backend="reference")
        return {"": run(lambda: [criterion(exact.terms, exact.predicted, exact.target).loss], exact.leaves, gradients)}

    def bytes(self, case: TailCase) -> Bytes:
        terms, boxes = case.layers * case.batch * 4, case.batch * 4 * 4
        return Bytes(
            read=3 * terms + 2 * boxes + case.batch,
            write=2 * terms + boxes,
            read_formula="in_box, rac, mrc, boxes, valid = 3*L*B*4 + 2*B*4*4 + B",
            write_formula="d rac, d mrc, d predicted = 2*L*B*4 + B*4*4",
        )

    def floor(self, inputs: TailInputs) -> None:
        return None  # a megabyte at most: moving it takes less than calling anything

    def tolerance(self, case: TailCase) -> float:
        return 2e-5


def _predictions(target: Tensor, generator: torch.Generator) -> Tensor:
    """Boxes off by a part of the target's size, whose IoUs have the same ranks in float32 and float64.

    rho jumps where two IoUs change places, so a prediction whose IoU is next to another's is drawn again. Those that
    miss their target all have IoU 0, in any precision.
    """
    predicted = torch.empty_like(target)
    again = torch.ones(len(target), dtype=torch.bool)
    while again.any():
        near = target[again]
        noise = torch.randn(near.shape, generator=generator)
        centre = near[:, :2] + 0.3 * noise[:, :2] * near[:, 2:]
        size = near[:, 2:] * (0.3 * noise[:, 2:]).exp()
        predicted[again] = torch.cat([centre, size], dim=1)
        iou, _ = box_iou(predicted.double(), target.double())
        ordered, order = iou.sort()
        close = (ordered[1:] - ordered[:-1] < _LEAST_GAP) & (ordered[1:] > 0)
        again = torch.zeros_like(again)
        again[order[1:][close]] = True
    return predicted
