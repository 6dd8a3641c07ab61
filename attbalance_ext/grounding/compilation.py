"""The training step under `torch.compile`: whole, for every length of sentence, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attbalance_ext import AttBalanceOutput
from attbalance_ext.grounding.batch import Batch
from attbalance_ext.grounding.errors import UserError

Objective = Callable[[Batch], AttBalanceOutput]


def compiled(objective: Objective, backend: str = "inductor") -> Objective:
    """``objective`` as one graph; what cannot be one is an error and never runs uncompiled."""
    whole = torch.compile(objective, fullgraph=True, backend=backend)

    def any_length(batch: Batch) -> AttBalanceOutput:
        # Known from the first step on: a graph made for one length first would be another graph in a resumed run, and
        # might round otherwise.
        for tensor in (batch.words, batch.word_padding):
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return whole(batch)

    return any_length


def require_compiler(device: torch.device) -> None:
    """Compile and run a function that does next to nothing.

    Raises:
        UserError: PyTorch finds no compiler for ``device``: on the CPU it needs C++, on a GPU Triton.
    """

    def add_one(x: Tensor) -> Tensor:
        return x + 1

    try:
        torch.compile(add_one, fullgraph=True)(torch.zeros(8, device=device))
    except RuntimeError as error:
        needed = "a C++ compiler (g++ or clang++; CXX names another)" if device.type == "cpu" else "Triton"
        cause = str(error).strip().partition("\n\n")[0]
        raise UserError(f"--compile needs {needed}, and a trial failed: {cause}") from None
