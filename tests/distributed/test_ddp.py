"""Two processes on halves of the batch against one process on the whole of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from helpers_hosts import Grounder, relative_error
from helpers_ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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
    """What one process saw in each step."""

    rho: list[Tensor]
    iou: list[Tensor]
    gradients: list[list[Tensor]]
    parameters: list[Tensor]
    teacher: list[Tensor]


def train(wrap: Any, part: slice, rho: str, backend: str) -> Result:
    torch.manual_seed(0)
    model = Grounder()
    tap = AttentionTap(model.attention_layers(), visual=slice(1, None))
    teacher = MomentumTeacher(model, lambda copy: AttentionTap(copy.attention_layers(), visual=slice(1, None)))
    runner: nn.Module = wrap(model)
    objective = AttBalanceLoss(AttBalanceConfig(rho=rho), backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    result = Result([], [], [], [], [])
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        visual = torch.randn(BATCH, 16, 16, generator=generator)[part]
        target = 0.2 + 0.6 * torch.rand(BATCH, 4, generator=generator)
        target[1, 2] = 0  # covers no token: is not ranked
        target = target[part]
        padding = (torch.arange(17) >= torch.randint(9, 18, (BATCH, 1), generator=generator))[part]
        teacher.update(runner)
        teachers = teacher.attention(visual, padding)
        with tap.recording():
            boxes = runner(visual, padding)
        terms = attention_terms(tap.attention(), BoxRegion(target, (4, 4)), teacher=teachers, backend=backend)
        output = objective(terms, boxes, target)
        optimizer.zero_grad()
        output.loss.backward()
        result.rho.append(output.rho)
        result.iou.append(output.iou)
        result.gradients.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    result.parameters.extend(p.detach().clone() for p in model.parameters())
    result.teacher.extend(p.clone() for p in teacher.module.parameters())
    return result


WRAPS = {
    "ddp": DistributedDataParallel,
    "find_unused": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "static_graph": lambda model: DistributedDataParallel(model, static_graph=True),
}


def worker(rank: int) -> dict[tuple[str, str, str], dict[str, Any]]:
    share = BATCH // WORLD
    part = slice(rank * share, (rank + 1) * share)
    results = {}
    for name, wrap in WRAPS.items():
        for backend in BACKENDS:
            results[name, backend, "global"] = train(wrap, part, "global", backend)._asdict()
    results["ddp", "reference", "batch"] = train(WRAPS["ddp"], part, "batch", "reference")._asdict()
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str, str], Result]]:
    """The results of both processes, by (wrapper, backend, source of rho)."""
    loaded = run_ranks(worker, WORLD, tmp_path_factory.mktemp("ranks"))
    return [{key: Result(**value) for key, value in results.items()} for results in loaded]


@pytest.fixture(scope="module")
def whole() -> dict[str, Result]:
    """One process on the whole batch, by backend."""
    return {backend: train(lambda model: model, slice(None), "batch", backend) for backend in BACKENDS}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrap", WRAPS)
def test_gradients_equal_one_process_on_the_whole_batch(ranks, whole, wrap: str, backend: str) -> None:
    for results in ranks:
        result = results[wrap, backend, "global"]
        for step in range(STEPS):
            pairs = zip(result.gradients[step], whole[backend].gradients[step], strict=True)
            assert all(relative_error(a, b) < 2e-5 for a, b in pairs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_global_rho_is_that_of_the_whole_batch(ranks, whole, backend: str) -> None:
    for step in range(STEPS):
        expected = whole[backend].rho[step]
        assert expected.abs().max() > 0.05  # not the zero of an undefined one
        for results in ranks:
            torch.testing.assert_close(results["ddp", backend, "global"].rho[step], expected, rtol=1e-6, atol=1e-7)


def test_batch_rho_is_each_processs_own(ranks, whole) -> None:
    first, second = (results["ddp", "reference", "batch"] for results in ranks)
    assert not torch.allclose(first.rho[0], second.rho[0])
    assert not torch.allclose(first.rho[0], whole["reference"].rho[0])


def test_processes_see_their_own_part_of_the_batch(ranks, whole) -> None:
    halves = torch.cat([results["ddp", "reference", "global"].iou[0] for results in ranks])
    torch.testing.assert_close(halves, whole["reference"].iou[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_students_and_teachers_stay_in_step(ranks, whole, backend: str) -> None:
    first, second = (results["ddp", backend, "global"] for results in ranks)
    for kind in ("parameters", "teacher"):
        for a, b, expected in zip(
            getattr(first, kind), getattr(second, kind), getattr(whole[backend], kind), strict=True
        ):
            assert torch.equal(a, b)
            assert relative_error(a, expected) < 1e-5
