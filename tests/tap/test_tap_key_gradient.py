"""The gradient by the keys, which a tap adds to the host's own in one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import DOUBLE, poisoned_memory, same_bits
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from attbalance_ext import AttentionTap, QueryAttention, attention_terms
from attbalance_ext.key_gradient import tapped

VISUAL = {
    "all": slice(None),
    "end": slice(3, None),
    "middle": slice(2, -2),
    "every other": slice(1, 8, 2),
    "none": slice(4, 4),
}


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def whole(x: Tensor, query: Tensor, factor: Tensor, visual: slice, batch_first: bool) -> Tensor:
    """dL/dx of the factors alone, written out."""
    out = torch.zeros_like(x)
    (out if batch_first else out.transpose(0, 1))[:, visual] = factor[..., None] * query[:, None]
    return out


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "sequence_first"])
@pytest.mark.parametrize("visual", VISUAL.values(), ids=VISUAL)
def test_adds_to_the_hosts_gradient(visual: slice, batch_first: bool) -> None:
    x, query = (leaf(2, 9, 4) if batch_first else leaf(9, 2, 4)), leaf(2, 4)
    passed, offset = tapped(x, query, visual, batch_first=batch_first)
    assert torch.equal(passed, x)
    assert offset.shape == (2, len(range(9)[visual]))
    assert not offset.any()
    incoming, factor = torch.randn_like(x), torch.randn_like(offset)
    expected = whole(x, query, factor, visual, batch_first).detach()
    with poisoned_memory():
        (both,) = torch.autograd.grad([passed, offset], x, [incoming, factor], retain_graph=True)
        (alone,) = torch.autograd.grad(offset, x, factor, retain_graph=True)
        (host,) = torch.autograd.grad(passed, x, incoming)
    torch.testing.assert_close(both, incoming + expected, rtol=1e-15, atol=1e-15)
    assert torch.equal(alone, expected)
    assert same_bits(host, incoming)


def test_the_hosts_gradient_is_not_written_to() -> None:
    """The residual branch is given the very tensor that the layer is."""
    x = leaf(2, 5, 4)
    passed, offset = tapped(x, leaf(2, 4), slice(None), batch_first=True)
    incoming = torch.randn(2, 5, 4, dtype=torch.float64)
    before = incoming.clone()
    torch.autograd.grad([passed, offset], x, [incoming, torch.ones_like(offset)])
    assert same_bits(incoming, before)


def test_rounds_once() -> None:
    x, query = leaf(3, 7, 16, dtype=torch.bfloat16), leaf(3, 16, dtype=torch.float32)
    passed, offset = tapped(x, query, slice(1, 6), batch_first=True)
    incoming, factor = torch.randn_like(x), torch.randn_like(offset)
    (got,) = torch.autograd.grad([passed, offset], x, [incoming, factor])
    exact = incoming.double()
    exact[:, 1:6] += factor[..., None].double() * query[:, None].double()
    # float32's sum may lie on the other side of the middle between two bfloat16 numbers, once in thousands
    assert (got == exact.to(torch.bfloat16)).double().mean() > 0.99
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-6)


class Calls(TorchDispatchMode):
    """Arguments of the backward ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.need_key: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention_terms_backward" in str(func):
            *_, need_key, need_dot = args
            assert need_dot
            self.need_key += need_key
        return func(*args, **(kwargs or {}))


def encoder(dtype: torch.dtype = torch.float64) -> tuple[nn.TransformerEncoder, AttentionTap]:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, dtype=dtype)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return model, AttentionTap([block.self_attn for block in model.layers], visual=slice(2, 8))


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_no_key_gradient_is_written_out(backend: str) -> None:
    model, tap = encoder(torch.float32)
    with tap.recording():
        output = model(torch.randn(2, 8, 16, requires_grad=True))
    terms = attention_terms(tap.attention(), torch.rand(2, 6), backend=backend)
    with Calls() as calls:
        (output.sum() + terms.rac.sum()).backward()
    assert calls.need_key == [False] * 3


@pytest.mark.parametrize("backend", DOUBLE)
def test_equals_the_keys_own_gradient(backend: str) -> None:
    """Without the offsets the same recording differentiates its keys."""
    model, tap = encoder()
    x, region = leaf(2, 8, 16), torch.rand(2, 6)
    found = []
    for with_offset in (True, False):
        with tap.recording():
            output = model(x)
        attention = tap.attention()
        assert all(offset is not None for offset in attention.offset)
        if not with_offset:
            attention = QueryAttention(attention.query, attention.key, attention.scale)
        loss = attention_terms(attention, region, backend=backend).rac.sum() + output.square().sum()
        found.append(torch.autograd.grad(loss, [x, *model.parameters()]))
    for routed, direct in zip(*found, strict=True):
        torch.testing.assert_close(routed, direct, rtol=1e-10, atol=1e-13)


def test_second_derivatives_by_the_reference() -> None:
    model, tap = encoder()
    region = torch.rand(1, 6)

    def penalty(x: Tensor) -> Tensor:
        with tap.recording():
            output = model(x)
        return attention_terms(tap.attention(), region, backend="reference").rac.sum() + output.square().sum()

    with sdpa_kernel(SDPBackend.MATH):  # the fused one has no second derivative
        assert torch.autograd.gradgradcheck(penalty, (leaf(1, 8, 16),), atol=1e-4)


def test_inputs_without_gradient_get_no_offset() -> None:
    model, tap = encoder()
    with tap.recording():
        model(torch.randn(1, 8, 16, dtype=torch.float64))
    first, *others = tap.attention().offset
    assert first is None
    assert all(offset is not None for offset in others)
