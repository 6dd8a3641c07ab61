"""Recording, handing over, forgetting: what a tap keeps, for how long, and what it refuses."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers_hosts import Grounder, Host
from torch import Tensor, nn

from attbalance_ext import AttentionTap, attention_map, attention_terms


@pytest.fixture
def host() -> Host:
    return Host(batch_first=True)


@pytest.fixture
def tap(host: Host) -> AttentionTap:
    return AttentionTap(list(host.layers))


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    """Memory that waits for the collector is memory kept: on a GPU it is a step's worth too late."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def rac(tap: AttentionTap, tokens: Tensor) -> Tensor:
    region = torch.zeros(tokens.shape[:2])
    region[:, :3] = 1
    return attention_terms(tap.attention(), region).rac.sum()


def record(host: nn.Module, tap: AttentionTap, tokens: Tensor) -> None:
    with tap.recording():
        host(tokens)


def test_layers_come_in_the_order_they_were_given(host: Host) -> None:
    forwards, backwards = AttentionTap(list(host.layers)), AttentionTap(list(host.layers)[::-1])
    with forwards.recording(), backwards.recording():
        host(torch.randn(2, 5, 16))
    first, second = forwards.attention(), backwards.attention()
    assert all(torch.equal(a, b) for a, b in zip(first.query, second.query[::-1], strict=True))
    assert not torch.equal(first.query[0], first.query[1])


def test_recording_twice_keeps_the_last(host: Host, tap: AttentionTap) -> None:
    old, new = torch.randn(2, 5, 16), torch.randn(3, 4, 16)
    record(host, tap, old)
    record(host, tap, new)
    assert torch.equal(tap.attention().key[0], new)


def test_a_recording_is_handed_over_once(host: Host, tap: AttentionTap) -> None:
    record(host, tap, torch.randn(2, 5, 16))
    tap.attention()
    with pytest.raises(RuntimeError, match=r"no recording of layer\(s\) \[0, 1\]"):
        tap.attention()


def test_forward_passes_outside_a_recording_are_not_kept(host: Host, tap: AttentionTap) -> None:
    host(torch.randn(2, 5, 16))
    with pytest.raises(RuntimeError, match="no recording"):
        tap.attention()
    inside = torch.randn(2, 5, 16)
    record(host, tap, inside)
    host(torch.randn(2, 5, 16))
    assert torch.equal(tap.attention().key[0], inside)


def test_several_forward_passes_before_one_backward(host: Host, tap: AttentionTap) -> None:
    batches = [torch.randn(2, 5, 16), torch.randn(3, 7, 16)]
    alone = []
    for tokens in batches:
        record(host, tap, tokens)
        alone.append(torch.autograd.grad(rac(tap, tokens), host.layers[0].in_proj_weight)[0])
    losses = []
    for tokens in batches:
        record(host, tap, tokens)
        losses.append(rac(tap, tokens))
    (together,) = torch.autograd.grad(sum(losses), host.layers[0].in_proj_weight)
    torch.testing.assert_close(together, alone[0] + alone[1])


def test_gradient_accumulation(host: Host, tap: AttentionTap) -> None:
    """Micro-batches with a backward pass each add up to the whole batch."""
    whole = torch.randn(4, 5, 16)
    record(host, tap, whole)
    rac(tap, whole).backward()
    expected = [p.grad.clone() for p in host.parameters() if p.grad is not None]
    host.zero_grad()
    for part in whole.chunk(2):
        record(host, tap, part)
        rac(tap, part).backward()
    actual = [p.grad for p in host.parameters() if p.grad is not None]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_attention_stays_valid_after_an_optimizer_step_on_other_parameters(host: Host, tap: AttentionTap) -> None:
    record(host, tap, torch.randn(2, 5, 16))
    attention = tap.attention()
    before = attention_map(attention)
    with torch.no_grad():
        host.layers[0].in_proj_weight.mul_(2)
    assert torch.equal(attention_map(attention), before)


def watch_inputs(host: Host) -> list[weakref.ref[Tensor]]:
    watched: list[weakref.ref[Tensor]] = []

    def watch(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        watched.append(weakref.ref(kwargs["query"]))

    for layer in host.layers:
        # prepend: what the host gives, not what a tap passes on
        layer.register_forward_pre_hook(watch, with_kwargs=True, prepend=True)
    return watched


@pytest.mark.usefixtures("no_garbage_collector")
def test_nothing_is_kept_once_the_attention_is_dropped(host: Host, tap: AttentionTap) -> None:
    watched = watch_inputs(host)
    record(host, tap, torch.randn(2, 5, 16))
    attention = tap.attention()
    watched += [weakref.ref(t) for t in (*attention.query, *attention.key)]
    assert len(watched) == 6
    assert all(ref() is not None for ref in watched)
    del attention
    assert [ref() for ref in watched] == [None] * 6


@pytest.mark.usefixtures("no_garbage_collector")
@pytest.mark.parametrize("way", ["not_recording", "removed", "recorded_again", "tap_deleted"])
def test_nothing_is_kept_otherwise(host: Host, way: str) -> None:
    tap = AttentionTap(list(host.layers))
    watched = watch_inputs(host)
    if way == "not_recording":
        host(torch.randn(2, 5, 16))
    else:
        record(host, tap, torch.randn(2, 5, 16))
    first = list(watched)
    if way == "removed":
        tap.remove()
    elif way == "recorded_again":
        record(host, tap, torch.randn(2, 5, 16))
    elif way == "tap_deleted":
        tap.remove()
        gone = weakref.ref(tap)
        del tap
        assert gone() is None
    assert [ref() for ref in first] == [None] * 2


def test_an_error_in_the_model_ends_the_recording(host: Host, tap: AttentionTap) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = host.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        record(host, tap, torch.randn(2, 5, 16))
    with pytest.raises(RuntimeError, match=r"layer\(s\) \[1\]"):
        tap.attention()
    handle.remove()
    host(torch.randn(2, 5, 16))
    with pytest.raises(RuntimeError, match="no recording"):
        tap.attention()
    tokens = torch.randn(2, 5, 16)
    record(host, tap, tokens)
    assert torch.equal(tap.attention().key[0], tokens)


def test_a_removed_tap_refuses_and_leaves_no_hook(host: Host, tap: AttentionTap) -> None:
    tap.remove()
    tap.remove()
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in host.layers)
    with pytest.raises(RuntimeError, match="removed"):
        record(host, tap, torch.randn(2, 5, 16))


def test_removing_a_tap_leaves_other_hooks_and_taps(host: Host, tap: AttentionTap) -> None:
    seen = []
    host.layers[0].register_forward_hook(lambda *_: seen.append(1))
    other = AttentionTap(list(host.layers))
    tap.remove()
    record(host, other, torch.randn(2, 5, 16))
    assert len(other.attention().key) == 2
    assert seen == [1]


def test_a_layer_that_runs_twice_is_refused(host: Host, tap: AttentionTap) -> None:
    tokens = torch.randn(2, 5, 16)
    with tap.recording():
        host(tokens)
        with pytest.raises(RuntimeError, match="layer 0, MultiheadAttention, ran twice"):
            host(tokens)


def test_a_layer_that_does_not_run_is_named(host: Host) -> None:
    spare = nn.MultiheadAttention(16, 2, batch_first=True)
    tap = AttentionTap([*host.layers, spare])
    record(host, tap, torch.randn(2, 5, 16))
    with pytest.raises(RuntimeError, match=r"layer\(s\) \[2\]"):
        tap.attention()


def test_a_recording_inside_a_recording_is_refused(host: Host, tap: AttentionTap) -> None:
    tokens = torch.randn(2, 5, 16)
    with tap.recording():
        with pytest.raises(RuntimeError, match="recording already"), tap.recording():
            pass
        host(tokens)
    assert torch.equal(tap.attention().key[0], tokens)


def test_training_without_gradients_is_refused(host: Host, tap: AttentionTap) -> None:
    with pytest.raises(RuntimeError, match="training mode needs gradients"), torch.no_grad():
        record(host, tap, torch.randn(2, 5, 16))
    host.eval()
    with torch.no_grad():
        record(host, tap, torch.randn(2, 5, 16))
    assert not tap.attention().query[0].requires_grad


def test_inference_mode(host: Host, tap: AttentionTap) -> None:
    tokens = torch.randn(2, 5, 16)
    host.eval()
    record(host, tap, tokens)
    expected = attention_map(tap.attention())
    with torch.inference_mode():
        record(host, tap, tokens)
        torch.testing.assert_close(attention_map(tap.attention()), expected)


@pytest.mark.parametrize("gradients", [True, False])
def test_unbatched_input_is_refused_only_while_recording(host: Host, tap: AttentionTap, gradients: bool) -> None:
    host.eval()
    tokens = torch.randn(5, 16)
    with torch.set_grad_enabled(gradients):
        assert host(tokens).shape == (5, 16)
        with pytest.raises(ValueError, match=r"batched input \(3-D\), got shape \(5, 16\)"):
            record(host, tap, tokens)


def test_a_layer_with_a_forward_of_its_own_is_refused_only_while_recording() -> None:
    class SelfAttention(nn.MultiheadAttention):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens, tokens, tokens, need_weights=False)[0]

    layer, tokens = SelfAttention(16, 4, batch_first=True), torch.randn(2, 5, 16)
    tap = AttentionTap([layer])
    assert layer(tokens).shape == tokens.shape
    with tap.recording(), pytest.raises(ValueError, match=r"forward\(query, key, value.*SelfAttention"):
        layer(tokens)


def test_a_float_mask_hides_what_it_sends_to_0() -> None:
    """And counts for nothing elsewhere."""
    layer = nn.MultiheadAttention(16, 2, batch_first=True)
    one = AttentionTap([layer])
    tokens, mask = torch.randn(2, 5, 16), torch.tensor([0.0, -1.0, -1e3, -1e5, -torch.inf])
    with one.recording():
        layer(tokens, tokens, tokens, key_padding_mask=mask.expand(2, 5))
    assert one.attention().padding.tolist() == [[False, False, False, True, True]] * 2


@pytest.mark.parametrize("index", [5, -6])
def test_a_query_index_out_of_range_is_refused_only_while_recording(host: Host, index: int) -> None:
    tap = AttentionTap(list(host.layers), query=index)
    tokens = torch.randn(2, 5, 16)
    host(tokens)
    with pytest.raises(ValueError, match=f"query must index one of the layer's 5 query tokens, got {index}"):
        record(host, tap, tokens)


def test_a_visual_slice_without_tokens_is_refused(host: Host) -> None:
    tap = AttentionTap(list(host.layers), visual=slice(7, 9))
    record(host, tap, torch.randn(2, 5, 16))
    with pytest.raises(ValueError, match="at least one token"):
        tap.attention()


def test_wrong_arguments() -> None:
    layer = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="modules is empty"):
        AttentionTap([])
    with pytest.raises(TypeError, match=r"modules\[1\] must be nn.MultiheadAttention, got Linear"):
        AttentionTap([layer, nn.Linear(8, 8)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="one layer twice"):
        AttentionTap([layer, layer])
    with pytest.raises(
        TypeError, match=r"query must be an int, a slice, a sequence of ints, an int64 tensor .* got float"
    ):
        AttentionTap([layer], query=0.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"visual must be a slice, a sequence of ints, an int64 tensor .* got int"):
        AttentionTap([layer], visual=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"modules must be a sequence of .*, got MultiheadAttention"):
        AttentionTap(layer)  # type: ignore[arg-type]
    assert not layer._forward_pre_hooks
    assert not layer._forward_hooks


class Owner(nn.Module):
    """A model that keeps its own tap, as people do."""

    def __init__(self) -> None:
        super().__init__()
        self.host = Host(batch_first=True)
        self.tap = AttentionTap(list(self.host.layers))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.host(tokens)


def deep_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickle_copy(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved_copy(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = pytest.mark.parametrize("make_copy", [deep_copy, pickle_copy, saved_copy])


@COPIES
def test_copies_of_a_model_have_no_working_tap(make_copy: Any) -> None:
    model = Grounder()
    tap = AttentionTap(model.attention_layers(), visual=slice(1, None))
    visual = torch.randn(2, 16, 16)
    with tap.recording():  # a recording that is under way, and holds tensors with a graph
        boxes = model(visual)
        twin = make_copy(model)
        assert torch.equal(twin(visual), boxes)  # would be "ran twice" if the copy's hooks worked
    attention = tap.attention()
    assert torch.equal(twin(visual), boxes)

    twin_tap = AttentionTap(twin.attention_layers(), visual=slice(1, None))
    with twin_tap.recording():
        twin(visual)
    assert torch.equal(attention_map(twin_tap.attention()), attention_map(attention))
    with pytest.raises(RuntimeError, match="no recording"):
        tap.attention()


@COPIES
def test_copies_of_a_model_that_owns_its_tap(make_copy: Any) -> None:
    model = Owner()
    tokens = torch.randn(2, 5, 16)
    with model.tap.recording():
        model(tokens)
        twin = make_copy(model)
    assert torch.equal(model.tap.attention().key[0], tokens)
    assert torch.equal(twin(tokens), model(tokens))
    with pytest.raises(RuntimeError, match="is a copy"):
        record(twin, twin.tap, tokens)
    twin.tap = AttentionTap(list(twin.host.layers))
    record(twin, twin.tap, tokens)
    assert len(twin.tap.attention().key) == 2
    twin.tap.remove()
    record(model, model.tap, tokens)  # the original's is its own
    assert len(model.tap.attention().key) == 2


def test_a_tap_adds_nothing_to_the_state_dict() -> None:
    model = Grounder()
    before = list(model.state_dict())
    AttentionTap(model.attention_layers())
    assert list(model.state_dict()) == before


def test_wrong_modules_are_told_what_to_give() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2), 2, enable_nested_tensor=False)
    for modules, got in ((encoder, "TransformerEncoder"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"got {got}: give the layers .* .layer.self_attn for layer in"):
            AttentionTap(modules)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"modules\[0\] .* got TransformerEncoderLayer: did you mean its \.self_attn\?"):
        AttentionTap(encoder.layers)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"query must be an int, .* got bool"):
        AttentionTap([encoder.layers[0].self_attn], query=True)
