"""The correctness gate: a provider is timed only after it has agreed with fp64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.task import Task, Truth


@dataclass(frozen=True)
class Verdict:
    """What the gate found: the worst relative error over outputs and gradients, and what it is the error of."""

    passed: bool
    error: float
    where: str

    def __str__(self) -> str:
        return f"{'ok' if self.passed else 'FAILED'}: {self.where} off by {self.error:.1e}"


def check(task: Task, truth: Truth, gradients: Sequence[Tensor], tolerance: float) -> Verdict:
    """Run `task` forward and backward once and compare with `truth`, tensor by tensor."""
    outputs = task.forward()
    got_gradients = task.backward(outputs, gradients)
    found = [
        *((f"output {i}", got, want) for i, (got, want) in enumerate(zip(outputs, truth.outputs, strict=True))),
        *(
            (f"gradient {i}", got, want)
            for i, (got, want) in enumerate(zip(got_gradients, truth.gradients, strict=True))
        ),
    ]
    errors = [(relative_error(got, want), where) for where, got, want in found]
    error, where = max(errors)
    return Verdict(error <= tolerance, error, where)


def relative_error(got: Tensor, want: Tensor) -> float:
    """``norm(got - want) / norm(want)`` in fp64; infinity where the shape is wrong or a value is not finite."""
    if got.shape != want.shape:
        return float("inf")
    got, want = got.detach().double(), want.double()
    error = torch.linalg.vector_norm(got - want)
    size = torch.linalg.vector_norm(want)
    ratio = float(error / size) if size > 0 else float(error)
    return ratio if ratio == ratio else float("inf")
