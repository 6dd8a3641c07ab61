"""What a suite asks of a provider, and the truth it is held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

MODES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Task:
    """One provider's way of computing one case, ready to run.

    `forward` returns the suite's outputs in the suite's order. `inputs` are the leaves whose gradients the suite
    compares, in the suite's order; `extra` are further leaves that this way of computing has to differentiate (the
    weights of a projection it repeats): timed, not compared. `modes` are those it can be timed in.
    """

    forward: Callable[[], Sequence[Tensor]]
    inputs: Sequence[Tensor]
    extra: Sequence[Tensor] = ()
    modes: Sequence[str] = MODES

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gradients of `inputs`, for one incoming gradient per output."""
        leaves = [*self.inputs, *self.extra]
        return torch.autograd.grad(list(outputs), leaves, list(gradients))[: len(self.inputs)]


@dataclass(frozen=True)
class Truth:
    """Outputs and input gradients of a case in fp64."""

    outputs: Sequence[Tensor]
    gradients: Sequence[Tensor]


@dataclass(frozen=True)
class Bytes:
    """The bytes a case has to move, with the formulas they come from. Nothing can move fewer."""

    read: int
    write: int
    read_formula: str
    write_formula: str


class Case(Protocol):
    """One point of a suite: shapes, dtype and everything else that decides the work."""

    @property
    def dtype(self) -> torch.dtype: ...

    def describe(self) -> dict[str, Any]:
        """The case as plain values, for the results file."""


class Suite(Protocol):
    """A family of cases that every provider can be asked to run."""

    name: str

    def inputs(self, case: Any, device: torch.device) -> Any:
        """The case's tensors, the same on every call."""

    def gradients(self, inputs: Any) -> Sequence[Tensor]:
        """The incoming gradient of every output."""

    def truth(self, inputs: Any) -> Truth: ...

    def bytes(self, case: Any) -> Bytes: ...

    def floor(self, inputs: Any) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The tensors whose bytes `bytes` counts: those read, those written."""

    def tolerance(self, case: Any) -> float:
        """Largest accepted ``norm(error) / norm(truth)`` of any output or gradient."""


class Provider(Protocol):
    """One way to compute the same thing. Which suites it takes part in is decided by `task`."""

    name: str
    title: str

    def task(self, suite: str, inputs: Any) -> Task | None:
        """This provider's task for a suite, or None where it has no part in that suite.

        Raises ``attbalance_ext.BackendUnavailable`` when it cannot run here.
        """
