"""A training step never makes the host wait for the device: teacher, tap, terms, loss, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from helpers import BACKENDS
from helpers_hosts import Grounder
from helpers_sync import HostSync, no_host_sync
from torch import Tensor

from attbalance_ext import (
    AttBalanceConfig,
    AttBalanceLoss,
    AttentionTap,
    BoxRegion,
    MomentumTeacher,
    QueryAttention,
    attention_map,
    attention_terms,
    spearman_rho,
)

# The meta device has no values to look at; it runs the reference only.
PLACES = pytest.mark.parametrize(("device", "backend"), [("meta", "reference"), *(("cpu", b) for b in BACKENDS)])


@pytest.fixture(autouse=True)
def _no_autocast_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch knows no autocast for the meta device, not even switching it off."""
    autocast = torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda device, **options: nullcontext() if device == "meta" else autocast(device, **options)
    )


def make_tap(model: Grounder) -> AttentionTap:
    return AttentionTap(model.attention_layers(), visual=slice(1, None))


@PLACES
@pytest.mark.parametrize("rho", ["batch", "global", "ema", "off", (0.3, 0.4)], ids=str)
def test_a_training_step(device: str, backend: str, rho: str | tuple[float, ...]) -> None:
    with torch.device(device):
        model = Grounder(dropout=0.1)
        visual, target = torch.randn(4, 16, 16), torch.rand(4, 4)
        padding = torch.zeros(4, 17, dtype=torch.bool)
    tap, teacher = make_tap(model), MomentumTeacher(model, make_tap)
    objective = AttBalanceLoss(AttBalanceConfig(rho=rho), backend).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with no_host_sync():
        for _ in range(2):  # "ema" differs from its second step on
            teacher.update(model)
            teachers = teacher.attention(visual, padding)
            with tap.recording():
                boxes = model(visual, padding)
            students = tap.attention()
            terms = attention_terms(students, BoxRegion(target, (4, 4)), teacher=teachers, backend=backend)
            output = objective(terms, boxes, target)
            output.loss.backward()
            optimizer.step()
            attention_map(students.last(1))
            spearman_rho(terms.in_box, output.iou, terms.valid)
        objective(None, boxes.detach(), target)
    assert output.loss.device.type == device
    assert output.rho.shape == (2,)


@PLACES
def test_a_query_of_its_own_for_each_sample(device: str, backend: str) -> None:
    """Chosen after the forward pass, among queries and visual tokens that an index names."""

    def tapped(model: Grounder) -> AttentionTap:
        return AttentionTap(model.attention_layers(), query=[0, 5, -1], visual=[3, 1, 8, 6])

    with torch.device(device):
        model = Grounder()
        visual, target = torch.randn(4, 16, 16), torch.rand(4, 4)
        matched = torch.zeros(4, dtype=torch.int64)
    tap, teacher = tapped(model), MomentumTeacher(model, tapped)
    with no_host_sync():
        with tap.recording():
            model(visual)
        students, teachers = tap.attention(matched), teacher.attention(visual, query=matched)
        attention_terms(students, BoxRegion(target, (2, 2)), teacher=teachers, backend=backend).rac.sum().backward()
    assert model.layers[0].self_attn.in_proj_weight.grad is not None


@PLACES
@pytest.mark.parametrize("rule", ["touch", "center", "coverage", "nearest"])
def test_every_rule(device: str, backend: str, rule: str) -> None:
    with torch.device(device):
        query, key, target = torch.randn(2, 8), torch.randn(2, 20, 8), torch.rand(2, 4)
    with no_host_sync():
        region = BoxRegion(target, ((4, 4), (2, 2)), rule)
        terms = attention_terms(QueryAttention(query, key, 0.1), region, backend=backend)
        weights = attention_terms(QueryAttention(query, key, 0.1), region.mask(), backend=backend)
    assert terms.rac.shape == weights.rac.shape == (1, 2)


SYNCHRONISING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x[0] > 0),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x),
    "mask": lambda x: x[x > 0],
    "to_host": lambda x: x.cpu(),
    "to_device": lambda x: x.new_tensor([1.0, 2.0]),
    "numpy": lambda x: x.numpy(),
}


@pytest.mark.parametrize("name", SYNCHRONISING)
def test_the_guard_sees(name: str) -> None:
    """The guard itself: what synchronises on a GPU raises on the meta device."""
    x = torch.zeros(3, device="meta")
    with pytest.raises((HostSync, RuntimeError, NotImplementedError, TypeError)), no_host_sync():
        SYNCHRONISING[name](x)
