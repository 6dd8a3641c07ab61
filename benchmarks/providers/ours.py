"""The two ops through the public API, on one backend. Backend "reference" is plain PyTorch run eagerly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from attbalance_ext import AttBalanceLoss, attention_terms
from benchmarks.differentiable import differentiable
from benchmarks.suites.op import OpInputs
from benchmarks.suites.tail import TailInputs
from benchmarks.task import Task


def op(backend: str) -> Callable[[OpInputs], Task]:
    def task(inputs: OpInputs) -> Task:
        student, teacher, region = inputs.student(), inputs.teacher(), inputs.region
        # Nothing is computed here: an unusable backend says so now, before it is checked and timed.
        attention_terms(student.last(0), region, backend=backend)

        def forward() -> Sequence[Tensor]:
            return attention_terms(student, region, teacher=teacher, backend=backend)[: inputs.outputs]

        return differentiable(forward, inputs.leaves, inputs.gradients)

    return task


def tail(backend: str) -> Callable[[TailInputs], Task]:
    def task(inputs: TailInputs) -> Task:
        criterion, terms = AttBalanceLoss(backend=backend), inputs.terms

        def forward() -> Sequence[Tensor]:
            return [criterion(terms, inputs.predicted, inputs.target).loss]

        forward()  # an unusable backend says so now
        return differentiable(forward, inputs.leaves, inputs.gradients)

    return task
