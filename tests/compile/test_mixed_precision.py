"""The reference model under autocast, eager and compiled, with and without a gradient scaler."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers_compile import graphs
from helpers_hosts import relative_error
from torch import Tensor

from attbalance_ext.grounding.compilation import compiled
from attbalance_ext.grounding.train import Trainer

Start = Callable[..., Trainer]
SMALL = {"layers": 1, "supervised": [0]}


def make(start: Start, backend: str, compile_it: bool) -> Trainer:
    trainer = start(backend=backend, model_options=SMALL)
    if compile_it:
        trainer.objective = compiled(trainer.objective, "aot_eager")
    return trainer


def loss(trainer: Trainer, half: torch.dtype | None) -> Tensor:
    """Of the first batch, under autocast to ``half`` where one is given."""
    batch = trainer.split.batch(torch.arange(8))
    with torch.autocast("cpu", half, enabled=half is not None):
        return trainer.objective(batch).loss


@pytest.mark.parametrize(
    ("backend", "half", "compile_it"),
    [
        ("cpu", torch.bfloat16, False),
        ("cpu", torch.bfloat16, True),
        ("cpu", torch.float16, False),
        ("reference", torch.bfloat16, False),
    ],
)
def test_gradients_are_near_those_of_float32(start: Start, backend: str, half: torch.dtype, compile_it: bool) -> None:
    exact = make(start, backend, compile_it=False)
    expected = loss(exact, None)
    expected.backward()
    trainer = make(start, backend, compile_it)
    actual = loss(trainer, half)
    actual.backward()
    assert actual.dtype == torch.float32
    assert graphs() == int(compile_it)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=0)
    gradients = [torch.cat([p.grad.flatten() for p in t.parameters]) for t in (trainer, exact)]
    assert relative_error(*gradients) < (8e-2 if half == torch.bfloat16 else 1e-2)


@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
def test_the_scaler_skips_a_step_that_overflows_and_then_goes_on(start: Start, compile_it: bool) -> None:
    trainer = make(start, "cpu", compile_it)
    optimizer = torch.optim.SGD(trainer.parameters, lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=2.0**-20)
    values, changed = [], []
    for _ in range(3):
        before = [parameter.detach().clone() for parameter in trainer.parameters]
        value = loss(trainer, torch.float16)
        optimizer.zero_grad()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        values.append(value.item())
        changed.append(any(not torch.equal(p, old) for p, old in zip(trainer.parameters, before, strict=True)))
    assert changed == [False, True, True]
    assert scaler.get_scale() == 2.0**10
    assert values[2] < values[1]
    assert all(parameter.isfinite().all() for parameter in trainer.parameters)
    assert graphs() == int(compile_it)
