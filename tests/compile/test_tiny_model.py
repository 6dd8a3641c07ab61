"""transvg-tiny trained on the built-in data, its step compiled whole: eager losses, one graph for every batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers_compile import assert_same_curve, graphs
from torch import Tensor

from attbalance_ext import AttBalanceOutput
from attbalance_ext.grounding.batch import Batch
from attbalance_ext.grounding.compilation import compiled
from attbalance_ext.grounding.train import Trainer

Start = Callable[..., Trainer]
SIZES = (8, 5, 3)
SMALL = {"layers": 1, "supervised": [0]}


class ChangingSizes:
    """An order of the data whose batches are of ``SIZES`` in turn."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def indices(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        return torch.randperm(self.samples, generator=generator)[: SIZES[step % len(SIZES)]]

    def epoch(self, step: int) -> int:
        return 0


def losses(trainer: Trainer, steps: int) -> list[float]:
    """Train ``trainer``; its loss in each step."""
    trainer.order = ChangingSizes(len(trainer.split))
    trainer.log_every = 1
    while trainer.step < steps:
        trainer.advance()
    return [record["loss"] for record in trainer.log.history["train"]]


def with_dynamic_batch(objective: Callable[[Batch], AttBalanceOutput]) -> Callable[[Batch], AttBalanceOutput]:
    def call(batch: Batch) -> AttBalanceOutput:
        for tensor in vars(batch).values():
            if tensor is not None:
                torch._dynamo.mark_dynamic(tensor, 0)
        return objective(batch)

    return call


def in_float64(trainer: Trainer) -> Trainer:
    """In float32 the compiler's other rounding grows with each step of AdamW; here it stays far below the bound."""
    assert trainer.teacher is not None
    trainer.model.double()
    trainer.teacher.double()
    for name in ("prepared", "boxes", "box_ratio"):
        setattr(trainer.split, name, getattr(trainer.split, name).double())
    return trainer


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_fifty_steps_in_one_graph_give_eager_losses(start: Start, backend: str) -> None:
    """With PyTorch's own compiler, Inductor."""
    eager, trainer = (in_float64(start(backend=backend)) for _ in range(2))
    trainer.objective = with_dynamic_batch(compiled(trainer.objective))
    assert_same_curve(losses(trainer, 50), losses(eager, 50))
    assert graphs() == 1


def test_two_graphs_at_most_serve_every_batch_size_unmarked(start: Start) -> None:
    """PyTorch specialises on the first size, then compiles once more for all others."""
    eager, trainer = start(backend="cpu", model_options=SMALL), start(backend="cpu", model_options=SMALL)
    trainer.objective = compiled(trainer.objective, "eager")
    assert_same_curve(losses(trainer, 6), losses(eager, 6))
    assert graphs() == 2


def test_the_plain_box_loss_is_one_graph_too(start: Start) -> None:
    options = {"backend": "cpu", "attbalance": False, "model_options": SMALL}
    eager, trainer = start(**options), start(**options)
    trainer.objective = with_dynamic_batch(compiled(trainer.objective, "aot_eager"))
    assert_same_curve(losses(trainer, 6), losses(eager, 6))
    assert graphs() == 1
