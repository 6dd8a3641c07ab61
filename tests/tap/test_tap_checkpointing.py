"""Recording under activation checkpointing: right gradients without reentrance, a refusal with it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from helpers_hosts import Grounder, relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from attbalance_ext import AttentionTap, BoxRegion, attention_terms

BATCH = 3
PADDING = torch.arange(17) >= torch.tensor([17, 15, 12])[:, None]
BOXES = torch.tensor([[0.3, 0.4, 0.5, 0.6], [0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.3, 0.4]])


def grounder(norm_first: bool) -> Grounder:
    torch.manual_seed(0)
    return Grounder(dropout=0.1, norm_first=norm_first).double()


def checkpoint_each_layer(model: Grounder, reentrant: bool) -> Callable[[Tensor, Tensor], Tensor]:
    for layer in model.layers:
        forward = layer.forward

        def recomputed(tokens: Tensor, src_key_padding_mask: Tensor, forward=forward) -> Tensor:
            return checkpoint(forward, tokens, None, src_key_padding_mask, use_reentrant=reentrant)

        layer.forward = recomputed
    return model


def checkpoint_whole_model(model: Grounder, reentrant: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def run(visual: Tensor, padding: Tensor) -> Tensor:
        return checkpoint(model, visual, padding, use_reentrant=reentrant)

    return run


GRANULARITY = pytest.mark.parametrize(
    "wrap", [checkpoint_each_layer, checkpoint_whole_model], ids=["each_layer", "whole_model"]
)


def gradients(
    model: Grounder,
    run: Callable[[Tensor, Tensor], Tensor],
    *,
    attention_weight: float = 1.0,
    backward_inside: bool = False,
    steps: int = 1,
) -> list[Tensor]:
    """Gradients of a step's box and attention loss, in every parameter and the model's input."""
    tap = AttentionTap(model.attention_layers(), visual=slice(1, None))
    torch.manual_seed(1)
    losses, inputs = [], []
    with tap.recording() if backward_inside else nullcontext():
        for _ in range(steps):
            inputs.append(torch.randn(BATCH, 16, 16, dtype=torch.float64, requires_grad=True))
            with nullcontext() if backward_inside else tap.recording():
                boxes = run(inputs[-1], PADDING)
            terms = attention_terms(tap.attention(), BoxRegion(BOXES, (4, 4)))
            losses.append((boxes - BOXES).abs().sum() + attention_weight * (terms.rac + terms.in_box).sum())
        sum(losses).backward()
    if backward_inside:  # the recomputation was not taken for a second forward pass
        with pytest.raises(RuntimeError, match="no recording"):
            tap.attention()
    tap.remove()
    return [t.grad for t in (*inputs, *model.parameters())]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(actual, expected, strict=True))


@GRANULARITY
@pytest.mark.parametrize("norm_first", [False, True], ids=["post_norm", "pre_norm"])
@pytest.mark.parametrize("backward_inside", [False, True], ids=["backward_after", "backward_inside"])
@pytest.mark.parametrize("early_stop", [True, False], ids=["early_stop", "full_recomputation"])
def test_gradients_without_reentrance(wrap, norm_first: bool, backward_inside: bool, early_stop: bool) -> None:
    """Without early stop PyTorch also checks that the recomputation saved the very same tensors."""
    plain, recomputed = grounder(norm_first), grounder(norm_first)
    expected = gradients(plain, plain)
    with set_checkpoint_early_stop(early_stop):
        actual = gradients(recomputed, wrap(recomputed, reentrant=False), backward_inside=backward_inside)
    assert_equal(actual, expected)


@GRANULARITY
def test_several_forward_passes_before_the_backward(wrap) -> None:
    plain, recomputed = grounder(False), grounder(False)
    assert_equal(gradients(recomputed, wrap(recomputed, reentrant=False), steps=2), gradients(plain, plain, steps=2))


@GRANULARITY
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("early_stop", [True, False], ids=["early_stop", "full_recomputation"])
def test_a_tap_that_does_not_record_changes_nothing(wrap, reentrant: bool, early_stop: bool) -> None:
    def step(tapped: bool, checkpointed: bool) -> list[Tensor]:
        model = grounder(False)
        if tapped:
            AttentionTap(model.attention_layers())
        run = wrap(model, reentrant) if checkpointed else model
        torch.manual_seed(1)
        visual = torch.randn(BATCH, 16, 16, dtype=torch.float64, requires_grad=True)
        with set_checkpoint_early_stop(early_stop):
            (run(visual, PADDING) - BOXES).abs().sum().backward()
        return [t.grad for t in (visual, *model.parameters())]

    for tapped in (False, True):
        assert_equal(step(tapped, checkpointed=True), step(tapped, checkpointed=False))


def test_an_attention_that_is_not_used_is_no_trouble() -> None:
    """Recorded, but without part in the loss: the recomputation still meets the same graph."""
    plain, recomputed = grounder(True), grounder(True)
    expected = gradients(plain, plain, attention_weight=0)
    actual = gradients(recomputed, checkpoint_each_layer(recomputed, reentrant=False), attention_weight=0)
    assert_equal(actual, expected)


@GRANULARITY
def test_reentrant_checkpointing_is_refused(wrap) -> None:
    model = grounder(False)
    run = wrap(model, reentrant=True)
    tap = AttentionTap(model.attention_layers(), visual=slice(1, None))
    visual = torch.randn(BATCH, 16, 16, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"reentrant activation checkpointing.*use_reentrant=False"), tap.recording():
        run(visual, PADDING)
