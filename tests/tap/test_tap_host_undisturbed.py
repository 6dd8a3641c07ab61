"""What a tap must leave alone: the host's output, gradients, random numbers and fused attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_hosts import Grounder, Host, captured_inputs
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attbalance_ext import AttentionTap, attention_map


def step(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Output, then every gradient, of one step that does not use the attention."""
    torch.manual_seed(1)  # dropout
    model.zero_grad(set_to_none=True)
    output = model(*inputs)
    output.square().mean().backward()
    return [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None), torch.rand(3)]


HOSTS: dict[str, Callable[[], tuple[nn.Module, list[nn.MultiheadAttention], tuple[Any, ...]]]] = {}


def host(build: Callable[[], Any]) -> Callable[[], Any]:
    HOSTS[build.__name__] = build
    return build


@host
def self_attention() -> Any:
    model = Host(batch_first=True, dropout=0.1)
    return model, list(model.layers), (torch.randn(2, 9, 16), None, torch.arange(9).expand(2, 9) > 6)


@host
def cross_attention() -> Any:
    model = Host(kdim=10, vdim=10, add_bias_kv=True, dropout=0.1)
    return model, list(model.layers), (torch.randn(2, 9, 16), torch.randn(2, 7, 10))


@host
def encoder_layers() -> Any:
    model = Grounder(dropout=0.1, batch_first=False)
    return model, model.attention_layers(), (torch.randn(2, 16, 16),)


@pytest.mark.parametrize("name", HOSTS)
def test_training_step_is_bit_equal_with_the_tap_on(name: str) -> None:
    model, layers, inputs = HOSTS[name]()
    without = step(model, inputs)
    tap = AttentionTap(layers)
    idle = step(model, inputs)
    with tap.recording():
        recorded = step(model, inputs)
    attention = tap.attention()
    tap.remove()
    removed = step(model, inputs)
    assert len(attention.key) == len(layers)
    for steps in (idle, recorded, removed):
        assert len(steps) == len(without)
        assert all(torch.equal(a, b) for a, b in zip(steps, without, strict=True))


@pytest.mark.parametrize("name", ["self_attention", "cross_attention"])
def test_evaluation_is_bit_equal_with_the_tap_on(name: str) -> None:
    """Of attention layers. (PyTorch's own encoder layer leaves its fused path in evaluation for any hook.)"""
    model, layers, inputs = HOSTS[name]()
    model.eval()
    with torch.no_grad():
        without = model(*inputs)
        tap = AttentionTap(layers)
        assert torch.equal(model(*inputs), without)
        with tap.recording():
            assert torch.equal(model(*inputs), without)


def test_adding_the_attention_objective_adds_its_gradient_and_nothing_else() -> None:
    model, layers, inputs = self_attention()
    tap = AttentionTap(layers)

    def gradients(task: float, attention: float) -> list[Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        with tap.recording():
            output = model(*inputs)
        weight = torch.linspace(0, 1, 9)
        (task * output.square().mean() + attention * (attention_map(tap.attention()) @ weight).sum()).backward()
        return [p.grad.clone() for p in model.parameters()]

    for task, attention, both in zip(gradients(1, 0), gradients(0, 1), gradients(1, 1), strict=True):
        torch.testing.assert_close(both, task + attention, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["train", "eval", "eval_no_grad"])
def test_attention_weights_are_never_asked_for(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers, inputs = self_attention()
    model.train(mode == "train")
    fused = F.scaled_dot_product_attention
    calls = []

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args[0].shape)
        return fused(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    asked = []
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: asked.append(output[1]))
    with torch.no_grad() if mode == "eval_no_grad" else nullcontext():
        model(*inputs)
        without = len(calls)
        with AttentionTap(layers).recording():
            model(*inputs)
    assert asked == [None] * (2 * len(layers))
    assert len(calls) == 2 * without  # the host's own calls; evaluation without grad has a fused kernel of its own
    assert without == (0 if mode == "eval_no_grad" else len(layers))


def flops(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


def test_no_projection_of_all_tokens_is_computed_again() -> None:
    """The tap multiplies one token per sample, never N: that is the point of folding the projection."""
    model, layers, inputs = self_attention()
    without = flops(model, inputs)
    tap = AttentionTap(layers)
    with tap.recording():
        added = flops(model, inputs) - without
    batch, width = 2, 16
    assert 0 < added <= len(layers) * 2 * (2 * batch * width * width)  # W_q x and W_k^T q, for B tokens a layer


def test_copies_and_passes_without_gradients_pay_nothing() -> None:
    model, layers, inputs = self_attention()
    without = flops(model, inputs)
    AttentionTap(layers)
    assert flops(copy.deepcopy(model), inputs) == without
    with torch.no_grad():
        assert flops(model, inputs) == without


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_record_shares_the_hosts_memory(batch_first: bool) -> None:
    """x is kept by reference: no copy of the keys, whichever the layout."""
    model = Host(layers=1, batch_first=batch_first)
    tokens = torch.randn(2, 9, 16)
    tap = AttentionTap(list(model.layers), visual=slice(2, 8))
    with tap.recording(), captured_inputs(model.layers) as inputs:
        model(tokens)
    (key,) = tap.attention().key
    assert key.untyped_storage().data_ptr() == inputs[0].key.untyped_storage().data_ptr()
    assert torch.equal(key, tokens[:, 2:8])
