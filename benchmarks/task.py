"""What the harness asks of a suite and of a provider."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.timing import Contender

MODES = ("forward", "backward", "both", "step")

Results = Mapping[str, Tensor]
"""What a computation gave, by name: outputs, and gradients of inputs."""


@dataclass(frozen=True)
class Task:
    """One provider's way of doing one case, ready to run.

    results: run once and hand over what the gate compares. calls: what can be timed, by mode. kept: bytes that autograd
    holds between forward and backward beyond the inputs; None where that is not asked. allocates: False where a call
    has its memory set aside beforehand, so that watching the allocator would say nothing.
    """

    results: Callable[[], Results]
    calls: Mapping[str, Contender]
    kept: Callable[[], int] | None = None
    allocates: bool = True


@dataclass(frozen=True)
class Provider:
    """One way to do a suite's cases.

    task: None where a case has no part for it; raises ``attbalance_ext.BackendUnavailable`` where it cannot run, or
    ``ModuleNotFoundError`` where it needs a package that is not installed.
    objective: which of the suite's truths it is held to. slack: a factor on the suite's tolerance, for a way that
    rounds more coarsely than it need. part: it does a part of the work alone, so that the others' time is no measure
    for its own.
    """

    name: str
    title: str
    task: Callable[[Any], Task | None]
    objective: str = ""
    devices: Sequence[str] = ("cpu", "cuda")
    part: bool = False
    slack: float = 1


@dataclass(frozen=True)
class Bytes:
    """The bytes a case has to move, with the formulas they come from. Nothing can move fewer."""

    read: int
    write: int
    read_formula: str
    write_formula: str

    def moved(self, mode: str) -> tuple[int, str]:
        """The bytes and the formula of a mode."""
        if mode == "forward":
            return self.read, self.read_formula
        if mode == "backward":
            return self.write, self.write_formula
        return self.read + self.write, f"{self.read_formula}; {self.write_formula}"


class Case(Protocol):
    """One point of a suite: a dataclass of shapes, dtype and everything else that decides the work."""

    def describe(self) -> dict[str, Any]:
        """The case as plain values, for the results file."""


class Suite(Protocol):
    """A family of cases, and the truth of each."""

    @property
    def name(self) -> str: ...

    @property
    def case(self) -> type[Any]:
        """The dataclass of its cases."""

    @property
    def defaults(self) -> Mapping[str, Sequence[Any]]:
        """The values of a field that are measured when the command line names none."""

    @property
    def modes(self) -> Sequence[str]: ...

    @property
    def rounds(self) -> int: ...

    @property
    def warmup(self) -> int: ...

    @property
    def baselines(self) -> Sequence[str]:
        """Providers whose time the others' are compared with."""

    def inputs(self, case: Any, device: torch.device) -> Any:
        """Everything that the providers of a case share, the same on every call."""

    def truth(self, inputs: Any) -> Mapping[str, Results]:
        """The right results, of each objective."""

    def tolerance(self, case: Any) -> float:
        """Largest accepted ``norm(error) / norm(truth)`` of any result."""

    def bytes(self, case: Any) -> Bytes | None:
        """None where a case is bound by arithmetic and no byte count says anything."""

    def floor(self, inputs: Any) -> tuple[Sequence[Tensor], Sequence[Tensor]] | None:
        """The tensors whose bytes `bytes` counts, those read and those written; None: their moving is not measured."""
