"""The library's own kernels, through the public API."""

from __future__ import annotations

from attbalance_ext import attention_terms
from benchmarks.suites.op import OpInputs
from benchmarks.task import Task


class Ours:
    """One backend of attbalance_ext."""

    def __init__(self, backend: str, name: str | None = None, title: str | None = None) -> None:
        self.name = name or f"ours-{backend}"
        self.title = title or f"attbalance_ext, backend {backend}"
        self._backend = backend

    def task(self, suite: str, inputs: OpInputs) -> Task | None:
        if suite != "op":
            return None
        student, teacher, region = inputs.student(), inputs.teacher(), inputs.region
        # Nothing is computed here: an unusable backend says so now, before it is checked and timed.
        attention_terms(student.last(0), region, backend=self._backend)
        return Task(
            lambda: attention_terms(student, region, teacher=teacher, backend=self._backend)[: inputs.outputs],
            [*inputs.query, *inputs.key],
        )
