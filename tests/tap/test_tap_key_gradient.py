"""The gradient by the keys, which a tap adds to the host's own in one pass."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import DOUBLE, poisoned_memory, same_bits
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from attbalance_ext import AttentionTap, QueryAttention, attention_terms
from attbalance_ext.key_gradient import interpose
from attbalance_ext.tokens import Tokens

VISUAL: dict[str, Any] = {
    "all": slice(None),
    "end": slice(3, None),
    "middle": slice(2, -2),
    "every other": slice(1, 8, 2),
    "none": slice(4, 4),
    "index": [7, 2, 3, 5],
    "index from the end": [-1, 4],
}


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def whole(x: Tensor, query: Tensor, factor: Tensor, visual: Any, batch_first: bool) -> Tensor:
    """dL/dx of the factors alone, written out."""
    out = torch.zeros_like(x)
    (out if batch_first else out.transpose(0, 1))[:, visual] = factor[..., None] * query[:, None]
    return out


def interposed(x: Tensor, query: Tensor, visual: Any, *, batch_first: bool) -> tuple[Tensor, Tensor]:
    made = interpose(x, Tokens("visual", visual), query.dtype, batch_first=batch_first)
    made.key_gradient.query = query
    return made.passed, made.offset


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "sequence_first"])
@pytest.mark.parametrize("visual", VISUAL.values(), ids=VISUAL)
def test_adds_to_the_hosts_gradient(visual: Any, batch_first: bool) -> None:
    x, query = (leaf(2, 9, 4) if batch_first else leaf(9, 2, 4)), leaf(2, 4).detach()
    passed, offset = interposed(x, query, visual, batch_first=batch_first)
    assert torch.equal(passed, x)
    assert offset.shape == (2, len(range(9)[visual] if isinstance(visual, slice) else visual))
    assert not offset.any()
    incoming, factor = torch.randn_like(x), torch.randn_like(offset)
    expected = whole(x, query, factor, visual, batch_first).detach()
    with poisoned_memory():
        (both,) = torch.autograd.grad([passed, offset], x, [incoming, factor], retain_graph=True)
        (alone,) = torch.autograd.grad(offset, x, factor, retain_graph=True)
        (host,) = torch.autograd.grad(passed, x, incoming, retain_graph=True)
    (in_a_graph,) = torch.autograd.grad([passed, offset], x, [incoming, factor], create_graph=True)
    torch.testing.assert_close(both, incoming + expected, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(in_a_graph, both, rtol=1e-15, atol=1e-15)
    assert torch.equal(alone, expected)
    assert same_bits(host, incoming)


QUERIES = {"first": 0, "last": -1, "several": slice(1, 4), "every other": slice(0, None, 2)}


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "sequence_first"])
@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_adds_the_gradient_of_the_query_tokens(query: int | slice, batch_first: bool) -> None:
    x, u = (leaf(2, 9, 4) if batch_first else leaf(9, 2, 4)), leaf(2, 4).detach()
    queries, visual = Tokens("query", query, one=True), Tokens("visual", slice(2, -2))
    passed, offset, rows, key_gradient = interpose(x, visual, x.dtype, queries=queries, batch_first=batch_first)
    key_gradient.query = u
    assert torch.equal(rows, (x if batch_first else x.transpose(0, 1))[:, query])
    incoming, factor, own = torch.randn_like(x), torch.randn_like(offset), torch.randn_like(rows)
    expected = torch.zeros_like(x)
    (expected if batch_first else expected.transpose(0, 1))[:, query] = own
    with poisoned_memory():
        (found,) = torch.autograd.grad([passed, offset, rows], x, [incoming, factor, own], retain_graph=True)
        (alone,) = torch.autograd.grad(rows, x, own, retain_graph=True)
        (no_factor,) = torch.autograd.grad([passed, rows], x, [incoming, own], retain_graph=True)
    (in_a_graph,) = torch.autograd.grad([passed, offset, rows], x, [incoming, factor, own], create_graph=True)
    keys = whole(x, u, factor, slice(2, -2), batch_first).detach()
    torch.testing.assert_close(found, incoming + keys + expected, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(in_a_graph, found, rtol=1e-15, atol=1e-15)
    assert torch.equal(alone, expected)
    torch.testing.assert_close(no_factor, incoming + expected, rtol=1e-15, atol=1e-15)


def test_the_query_tokens_come_in_the_factors_dtype() -> None:
    x = leaf(2, 5, 4, dtype=torch.bfloat16)
    queries = Tokens("query", 1, one=True)
    passed, _, rows, _ = interpose(x, Tokens("visual", slice(2, 4)), torch.float32, queries=queries, batch_first=True)
    assert rows.dtype == torch.float32
    incoming, own = torch.randn_like(passed), torch.randn_like(rows)
    (found,) = torch.autograd.grad([passed, rows], x, [incoming, own])
    assert found.dtype == torch.bfloat16
    expected = incoming.float()
    expected[:, 1] += own
    assert torch.equal(found, expected.bfloat16())  # rounded once


def test_the_hosts_gradient_is_not_written_to() -> None:
    """The residual branch is given the very tensor that the layer is."""
    x = leaf(2, 5, 4)
    passed, offset = interposed(x, torch.randn(2, 4).double(), slice(None), batch_first=True)
    incoming = torch.randn(2, 5, 4, dtype=torch.float64)
    before = incoming.clone()
    torch.autograd.grad([passed, offset], x, [incoming, torch.ones_like(offset)])
    assert same_bits(incoming, before)


def test_rounds_once() -> None:
    x, query = leaf(3, 7, 16, dtype=torch.bfloat16), torch.randn(3, 16)
    passed, offset = interposed(x, query, slice(1, 6), batch_first=True)
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


class Launches(TorchDispatchMode):
    """Counts what would be a launch on a device, by name."""

    VIEWS = frozenset(("alias", "detach", "expand", "select", "slice", "split", "t", "transpose", "unsqueeze", "view"))
    EMPTY = frozenset(("empty", "empty_like", "new_empty"))

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        moves_nothing = name == "copy_" and not result.numel()
        if name not in self.VIEWS | self.EMPTY and not moves_nothing:
            self.names[name] += 1
        return result


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "sequence_first"])
def test_launches_of_a_tapped_layer(batch_first: bool) -> None:
    """docs/performance.md counts them. Above all, no gradient of a few tokens is written among zeros for all."""

    def count(tapped: bool, layers: int) -> Counter[str]:
        blocks = [nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first) for _ in range(layers)]
        tap = AttentionTap([block.self_attn for block in blocks], visual=slice(2, None)) if tapped else None
        output = torch.randn(8, 8, 16, requires_grad=True)
        with Launches() as launches:
            with tap.recording() if tap else nullcontext():
                for block in blocks:
                    output = block(output)
            loss = output.sum()
            if tap:
                loss = loss + attention_terms(tap.attention(), torch.rand(8, 6), backend="cpu").rac.sum()
            loss.backward()
        return launches.names

    def added(layers: int) -> Counter[str]:
        with_tap = count(True, layers)
        with_tap.subtract(count(False, layers))
        return with_tap

    of_a_layer = added(3)
    of_a_layer.subtract(added(2))
    of_a_layer = +of_a_layer
    assert "select_backward" not in of_a_layer
    assert of_a_layer.pop("slice_backward") == 1  # of b_q in the layer's three biases: zeros and a copy
    assert of_a_layer.total() + 2 == 18, of_a_layer


@pytest.mark.parametrize("call", ["positions", "keywords", "mixed"])
def test_nor_is_it_however_the_layer_is_called(call: str) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    tap = AttentionTap([layer])
    x = torch.randn(2, 5, 8, requires_grad=True)
    with tap.recording():
        if call == "positions":
            layer(x, x, x)
        elif call == "keywords":
            layer(query=x, key=x, value=x)
        else:
            layer(x, key=x, value=x)
    assert tap.attention().offset != (None,)


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


def test_padding_sees_no_query_that_is_not_finite() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    tap = AttentionTap([layer])
    query, key = torch.randn(2, 1, 8), torch.randn(2, 5, 8).requires_grad_()
    query[1] = torch.inf
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with tap.recording():
        layer(query, key, key, key_padding_mask=padding, need_weights=False)
    attention_terms(tap.attention(), torch.ones(2, 5).tril(1), backend="cpu").rac.sum().backward()
    assert key.grad[0].isfinite().all()
    assert key.grad[1, :3].isnan().all()
    assert not key.grad[1, 3:].any()


@pytest.mark.parametrize("change", ["key", "weights"])
def test_later_hooks_of_the_layer_are_seen(change: str) -> None:
    """What a hook that comes after the tap's makes of the key, or of the weights as `prune` does, is what counts."""
    layer = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    tap = AttentionTap([layer])
    if change == "key":
        layer.register_forward_pre_hook(lambda module, args: (args[0], 3 * args[1], args[2]))
    else:
        prune.random_unstructured(layer, "in_proj_weight", 0.5)
    found = []
    for backend in DOUBLE:
        torch.manual_seed(0)
        x = leaf(2, 5, 8)
        for _ in range(2):  # a second step has a graph of its own
            with tap.recording():
                output = layer(x, x.clone(), x)[0]
            terms = attention_terms(tap.attention(), torch.ones(2, 5).tril(1), backend=backend)
            found.append(torch.autograd.grad(terms.rac.sum() + output.square().sum(), x)[0])
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], rtol=1e-11, atol=1e-13)


def test_function_transforms_of_a_tapped_model_that_is_not_recording() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    x = torch.randn(3, 1, 5, 8, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (sample, sample, sample))[0].square().sum()

    by_sample = torch.vmap(torch.func.grad(loss), (None, 0))
    before = by_sample(dict(layer.named_parameters()), x)
    AttentionTap([layer])
    after = by_sample(dict(layer.named_parameters()), x)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_layer_may_be_tried_again_inside_one_recording() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    tap = AttentionTap([layer])
    x = torch.randn(2, 5, 8, requires_grad=True)
    with tap.recording():
        with pytest.raises(AssertionError):  # the layer's own complaint
            layer(x, x[..., :4], x)
        layer(x, x, x)
    assert torch.equal(tap.attention().key[0], x)


def test_inputs_without_gradient_get_no_offset() -> None:
    model, tap = encoder()
    with tap.recording():
        model(torch.randn(1, 8, 16, dtype=torch.float64))
    first, *others = tap.attention().offset
    assert first is None
    assert all(offset is not None for offset in others)
