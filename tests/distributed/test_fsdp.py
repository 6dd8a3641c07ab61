"""A model sharded by `fully_shard` (FSDP2) over two processes, against one process on the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers_hosts import Grounder, relative_error
from helpers_ranks import run_ranks
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from attbalance_ext import (
    AttBalanceConfig,
    AttBalanceLoss,
    AttentionTap,
    BoxRegion,
    MomentumTeacher,
    attention_terms,
)

WORLD, BATCH, STEPS = 2, 8, 3
BACKENDS = ("reference", "cpu")  # processes of their own have no emulated device


class Result(NamedTuple):
    """What one process saw in each step; parameters and the teacher's at the end."""

    loss: list[Tensor]
    rho: list[Tensor]
    gradients: list[list[Tensor]]
    parameters: list[Tensor]
    teacher: list[Tensor]


# --- ways to shard: the model, and the teacher's copy of it -----------------------------------------------------------


def blocks(model: Grounder, teacher: Grounder) -> None:
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)


def one_unit(model: Grounder, teacher: Grounder) -> None:
    fully_shard(model)


def with_teacher(model: Grounder, teacher: Grounder) -> None:
    blocks(model, teacher)
    blocks(teacher, teacher)


def checkpointed(model: Grounder, teacher: Grounder) -> None:
    """Each block recomputed inside its unit, as PyTorch advises."""
    for position, layer in enumerate(model.layers):
        model.layers[position] = fully_shard(checkpoint_wrapper(layer))
    fully_shard(model)


def checkpointed_outside(model: Grounder, teacher: Grounder) -> None:
    """Each recomputation runs a unit again."""
    for position, layer in enumerate(model.layers):
        model.layers[position] = checkpoint_wrapper(fully_shard(layer))
    fully_shard(model)


SHARD: dict[str, Callable[[Grounder, Grounder], None]] = {
    function.__name__: function for function in (blocks, one_unit, with_teacher, checkpointed, checkpointed_outside)
}
RUNS = [(shard, "reference") for shard in SHARD] + [("blocks", "cpu"), ("checkpointed", "cpu")]


def tapped(model: Grounder) -> AttentionTap:
    return AttentionTap(model.attention_layers(), visual=slice(1, None))


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def train(shard: Callable[[Grounder, Grounder], None] | None, part: slice, rho: str, backend: str) -> Result:
    """Some steps on a part of each batch, all of it in float64."""
    torch.manual_seed(0)
    model = Grounder().double()
    tap, teacher = tapped(model), MomentumTeacher(model, tapped)
    if shard is not None:
        shard(model, teacher.module)
        assert all(isinstance(p, DTensor) for p in model.parameters())
    objective = AttBalanceLoss(AttBalanceConfig(rho=rho), backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    result = Result([], [], [], [], [])
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        visual = torch.randn(BATCH, 16, 16, generator=generator, dtype=torch.float64)[part]
        target = (0.2 + 0.6 * torch.rand(BATCH, 4, generator=generator, dtype=torch.float64))[part]
        padding = (torch.arange(17) >= torch.randint(9, 18, (BATCH, 1), generator=generator))[part]
        teacher.update(model)
        teachers = teacher.attention(visual, padding)
        with tap.recording():
            boxes = model(visual, padding)
        terms = attention_terms(tap.attention(), BoxRegion(target, (4, 4)), teacher=teachers, backend=backend)
        output = objective(terms, boxes, target)
        optimizer.zero_grad()
        output.loss.backward()
        result.loss.append(output.loss.detach())
        result.rho.append(output.rho)
        result.gradients.append([whole(p.grad) for p in model.parameters()])
        optimizer.step()
    teacher.update(model)
    result.parameters.extend(map(whole, model.parameters()))
    result.teacher.extend(map(whole, teacher.module.parameters()))
    return result


def worker(rank: int) -> dict[tuple[str, str], dict[str, Any]]:
    share = BATCH // WORLD
    part = slice(rank * share, (rank + 1) * share)
    return {(shard, backend): train(SHARD[shard], part, "global", backend)._asdict() for shard, backend in RUNS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Result]]:
    """The results of both processes, by (way to shard, backend)."""
    loaded = run_ranks(worker, WORLD, tmp_path_factory.mktemp("ranks"))
    return [{key: Result(**value) for key, value in results.items()} for results in loaded]


@pytest.fixture(scope="module")
def alone() -> dict[str, Result]:
    """One process on the whole batch, by backend."""
    return {backend: train(None, slice(None), "batch", backend) for backend in BACKENDS}


@pytest.mark.parametrize(("shard", "backend"), RUNS)
def test_losses_and_rho_equal_one_process_on_the_whole_batch(ranks, alone, shard: str, backend: str) -> None:
    for step in range(STEPS):
        loss = torch.stack([results[shard, backend].loss[step] for results in ranks]).mean()
        assert relative_error(loss, alone[backend].loss[step]) < 1e-9
        assert alone[backend].rho[step].abs().max() > 0.05  # not the zero of an undefined one
        for results in ranks:
            assert relative_error(results[shard, backend].rho[step], alone[backend].rho[step]) < 1e-6  # of float32


@pytest.mark.parametrize(("shard", "backend"), RUNS)
def test_gradients_equal_one_process_on_the_whole_batch(ranks, alone, shard: str, backend: str) -> None:
    for results in ranks:
        for step in range(STEPS):
            pairs = zip(results[shard, backend].gradients[step], alone[backend].gradients[step], strict=True)
            assert all(relative_error(a, b) < 1e-9 for a, b in pairs)


@pytest.mark.parametrize(("shard", "backend"), RUNS)
def test_students_and_teachers_stay_in_step(ranks, alone, shard: str, backend: str) -> None:
    expected = alone[backend]
    for results in ranks:
        result = results[shard, backend]
        for kind in ("parameters", "teacher"):
            pairs = zip(getattr(result, kind), getattr(expected, kind), strict=True)
            assert all(relative_error(a, b) < 1e-9 for a, b in pairs)
    lags = [relative_error(t, p) for t, p in zip(expected.teacher, expected.parameters, strict=True)]
    assert min(lags) > 1e-4
