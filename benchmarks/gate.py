"""The correctness gate: a provider is timed only after its results have agreed with the suite's truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.task import Results


@dataclass(frozen=True)
class Verdict:
    """What the gate found: the worst relative error over all results, and which result has it."""

    passed: bool
    error: float
    where: str

    def __str__(self) -> str:
        return f"{'ok' if self.passed else 'FAILED'}: {self.where} off by {self.error:.1e}"


def check(results: Results, truth: Results, tolerance: float) -> Verdict:
    """Compare what a provider computed with ``truth``, result by result; one that is left out is infinitely wrong."""
    errors = [
        (relative_error(results[name], want) if name in results else float("inf"), name) for name, want in truth.items()
    ]
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
