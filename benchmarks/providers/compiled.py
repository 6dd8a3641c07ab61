"""`torch.compile` of the reference, default mode: what a user gets by adding one line."""

from __future__ import annotations

import torch

from attbalance_ext import attention_terms
from benchmarks.suites.op import OpInputs
from benchmarks.task import Task


class Compiled:
    name = "compile"
    title = "torch.compile of the reference"

    def task(self, suite: str, inputs: OpInputs) -> Task | None:
        if suite != "op":
            return None
        # Each case gets its own static compilation; without the reset a new shape would be compiled as a dynamic one.
        torch.compiler.reset()
        student, teacher, region = inputs.student(), inputs.teacher(), inputs.region
        compiled = torch.compile(attention_terms, fullgraph=True, dynamic=False)
        return Task(
            lambda: compiled(student, region, teacher=teacher, backend="reference")[: inputs.outputs],
            [*inputs.query, *inputs.key],
        )
