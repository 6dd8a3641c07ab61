"""Tasks that are a differentiable function: what is compared, timed and counted follows from its forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.memory import kept_bytes
from benchmarks.task import Results, Task


def differentiable(
    forward: Callable[[], Sequence[Tensor]],
    leaves: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    extra: Sequence[Tensor] = (),
) -> Task:
    """The task of running ``forward`` and its backward pass.

    forward: the outputs, one for each of ``gradients`` (their incoming gradients, by the outputs' names). leaves: the
    inputs whose gradients are compared. extra: further leaves that this way of computing has to differentiate (the
    weights of a projection it repeats): timed, not compared.
    """
    wanted = [*leaves.values(), *extra]
    incoming = list(gradients.values())

    def backward(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return torch.autograd.grad(list(outputs), wanted, incoming)

    def both() -> object:
        return backward(forward())

    def prepare_backward() -> Callable[[], object]:
        outputs = forward()  # a fresh graph for every sample: freeing it is part of a backward pass
        return lambda: backward(outputs)

    return Task(
        results=lambda: run(forward, leaves, gradients, extra),
        calls={"forward": lambda: forward, "backward": prepare_backward, "both": lambda: both},
        kept=lambda: kept_bytes(forward, wanted),
    )


def run(
    forward: Callable[[], Sequence[Tensor]],
    leaves: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    extra: Sequence[Tensor] = (),
) -> Results:
    """Forward and backward once: outputs under the names of their incoming gradients, and the leaves' gradients."""
    outputs = forward()
    found = torch.autograd.grad(list(outputs), [*leaves.values(), *extra], list(gradients.values()))
    return {
        **{name: output.detach() for name, output in zip(gradients, outputs, strict=True)},
        **{f"gradient of {name}": gradient for name, gradient in zip(leaves, found, strict=False)},
    }
