"""How a whole step behaves as a guest on the device: streams, graphs, other devices, no waiting."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers import same_bits
from helpers_attention import Problem, make_problem
from helpers_gpu import BACKENDS, DEVICE, on_device
from torch import Tensor

from attbalance_ext import AttBalanceLoss, attention_terms

pytestmark = pytest.mark.gpu


# The names of our kernels. Triton gives them the functions' names.
KERNELS = {"cuda": "attbalance", "triton": "^(attend|finish|backward|_balanced_loss)$"}


class Step:
    """Both ops, forward and backward, on leaves that stay where they are."""

    def __init__(self, backend: str, device: torch.device = DEVICE, seed: int = 0) -> None:
        problem: Problem = on_device(make_problem(layers=4, batch=8, tokens=400, width=256, seed=seed), device)
        boxes = problem.region.boxes  # type: ignore[union-attr]
        self.problem, self.backend = problem, backend
        self.inputs = [*problem.query, *problem.key, (boxes * 1.1).contiguous()]
        for leaf in self.inputs:
            leaf.requires_grad_()
        self.criterion = AttBalanceLoss(backend=backend)

    def __call__(self) -> list[Tensor]:
        """Loss and gradients."""
        layers = len(self.problem.key)
        student = self.problem.student(self.inputs[:layers], self.inputs[layers:-1])
        terms = attention_terms(student, self.problem.region, teacher=self.problem.teacher, backend=self.backend)
        loss = self.criterion(terms, self.inputs[-1], self.problem.region.boxes).loss  # type: ignore[union-attr]
        return [loss.detach(), *torch.autograd.grad(loss, self.inputs)]

    @torch.no_grad()
    def take(self, other: Step) -> None:
        """The inputs of another step, copied into this one's memory."""
        for mine, its in zip(self._all(), other._all(), strict=True):
            mine.copy_(its)

    def _all(self) -> list[Tensor]:
        assert self.problem.teacher is not None
        boxes = self.problem.region.boxes  # type: ignore[union-attr]
        return [*self.inputs, *self.problem.teacher.query, *self.problem.teacher.key, boxes]


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_never_waits_for_the_device(backend: str) -> None:
    step = Step(backend)
    step()  # a first call may load kernels
    with no_synchronisation():
        step()
    with pytest.raises(RuntimeError, match="synchroniz"), no_synchronisation():
        torch.ones(1, device=DEVICE).item()  # else the test above could not fail


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_captured_graph_replays_on_new_inputs(backend: str) -> None:
    step, other = Step(backend, seed=0), Step(backend, seed=1)
    expected = other()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    step.take(other)
    for _ in range(3):
        graph.replay()
        assert all(map(same_bits, captured, expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_work_goes_to_the_current_stream(backend: str) -> None:
    """The inputs arrive late on a side stream. Kernels on any other stream would read what was there before."""
    step, other = Step(backend, seed=0), Step(backend, seed=1)
    expected = other()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(400_000_000)  # some 0.2 seconds
        step.take(other)
        found = step()
    assert not side.query(), "the host waited, so nothing was proven"
    side.synchronize()
    assert all(map(same_bits, found, expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_device_than_the_current_one(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    torch.cuda.set_device(0)
    found, expected = Step(backend, torch.device("cuda", 1))(), Step(backend, torch.device("cuda", 0))()
    assert torch.cuda.current_device() == 0
    for there, here in zip(found, expected, strict=True):
        assert there.device.index == 1
        torch.testing.assert_close(there.to(here.device), here)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_is_a_handful_of_launches(backend: str) -> None:
    """Ours: forward (two kernels where tokens are split over blocks), loss, backward."""
    step = Step(backend)
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    ours = [name for name in names if re.search(KERNELS[backend], name)]
    assert 3 <= len(ours) <= 5, names


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_in_one_graph(backend: str) -> None:
    step = Step(backend)
    layers = len(step.problem.key)

    @torch.compile(fullgraph=True)
    def forward(query: list[Tensor], key: list[Tensor], boxes: Tensor) -> Tensor:
        student = step.problem.student(query, key)
        terms = attention_terms(student, step.problem.region, teacher=step.problem.teacher, backend=backend)
        return step.criterion(terms, boxes, step.problem.region.boxes).loss  # type: ignore[union-attr]

    loss = forward(step.inputs[:layers], step.inputs[layers:-1], step.inputs[-1])
    gradients = torch.autograd.grad(loss, step.inputs)
    for actual, expected in zip([loss.detach(), *gradients], step(), strict=True):
        torch.testing.assert_close(actual, expected)
