"""`torch.compile` of the reference: what a user gets by adding one line.

In one graph: compiling around a custom op would compile nothing. Shapes are static, its best case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attbalance_ext import AttBalanceLoss, attention_terms
from benchmarks.differentiable import differentiable
from benchmarks.suites.op import OpInputs
from benchmarks.suites.tail import TailInputs
from benchmarks.task import Task


def op(mode: str) -> Callable[[OpInputs], Task]:
    def task(inputs: OpInputs) -> Task:
        student, teacher, region = inputs.student(), inputs.teacher(), inputs.region
        compiled = _compile(attention_terms, mode)

        def forward() -> Sequence[Tensor]:
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(student, region, teacher=teacher, backend="reference")[: inputs.outputs]

        return differentiable(forward, inputs.leaves, inputs.gradients)

    return task


def tail(mode: str) -> Callable[[TailInputs], Task]:
    def task(inputs: TailInputs) -> Task:
        compiled, terms = _compile(AttBalanceLoss(backend="reference"), mode), inputs.terms

        def forward() -> Sequence[Tensor]:
            torch.compiler.cudagraph_mark_step_begin()
            return [compiled(terms, inputs.predicted, inputs.target).loss]

        return differentiable(forward, inputs.leaves, inputs.gradients)

    return task


def _compile(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
