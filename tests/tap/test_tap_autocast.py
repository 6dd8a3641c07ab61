"""The tap under automatic mixed precision: folded queries and terms stay in float32, gradients stay right."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS
from helpers_hosts import (
    Grounder,
    LayerInputs,
    captured_inputs,
    explicit_map,
    explicit_scores,
    explicit_terms,
    relative_error,
)
from torch import Tensor, nn

from attbalance_ext import AttBalanceLoss, AttentionTap, AttentionTerms, BoxRegion, QueryAttention, attention_terms

BATCH = 4
BOXES = torch.tensor([[0.4, 0.4, 0.5, 0.5], [0.5, 0.5, 0.9, 0.3], [0.3, 0.6, 0.4, 0.4], [0.5, 0.5, 0.6, 0.6]])
HALF = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


class LinearHost(nn.Module):
    """Attention right behind a linear layer: under autocast its input is half precision, not LayerNorm's float32."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        nn.init.normal_(self.attention.in_proj_bias)

    def attention_layers(self) -> list[nn.MultiheadAttention]:
        return [self.attention]

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.linear(tokens)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


def folded(layer: nn.MultiheadAttention, token: Tensor) -> Tensor:
    """W_k^T (W_q x + b_q) in float32."""
    weight_q, weight_k, _ = layer.in_proj_weight.chunk(3)
    return F.linear(token.float(), weight_q, layer.in_proj_bias.chunk(3)[0]) @ weight_k


@HALF
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keys", ["half_keys", "float_keys"])
def test_the_folded_query_and_the_terms_are_float32(half: torch.dtype, backend: str, keys: str) -> None:
    model = LinearHost() if keys == "half_keys" else Grounder(layers=1, norm_first=True)
    visual = slice(0 if keys == "half_keys" else 1, None)
    (layer,) = model.attention_layers()
    tap = AttentionTap([layer], visual=visual)
    with torch.autocast("cpu", half):
        with tap.recording(), captured_inputs([layer]) as inputs:
            model(torch.randn(BATCH, 16, 16))
        attention = tap.attention()
        terms = attention_terms(attention, BoxRegion(BOXES, (4, 4)), backend=backend)
    (x,) = inputs
    assert attention.key[0].dtype == (half if keys == "half_keys" else torch.float32)
    assert torch.equal(attention.query[0], folded(layer, x.query[:, 0]))  # not a bit of it was rounded to half
    assert {term.dtype for term in terms[:3]} == {torch.float32}

    # The truth: the layer's weights and input, exactly as they are, in float64.
    wide = copy.deepcopy(layer).double()
    scores = explicit_scores(wide, LayerInputs(x.query.double(), x.key.double()), 0)[:, visual]
    map_ = explicit_map(scores, None)
    truth = explicit_terms([map_], BoxRegion(BOXES, (4, 4)).mask().double(), [map_])
    assert relative_error(terms.in_box, truth.in_box) < 2e-5
    assert relative_error(terms.rac, truth.rac) < 2e-5

    def gradients(terms: AttentionTerms, weight: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((terms.rac + terms.in_box).sum(), [weight, x.key], retain_graph=True)

    weight, tokens = gradients(terms, layer.in_proj_weight)
    expected_weight, expected_tokens = gradients(truth, wide.in_proj_weight)
    assert relative_error(weight, expected_weight) < 2e-5
    assert tokens.dtype == x.key.dtype
    assert relative_error(tokens, expected_tokens) < (3e-2 if keys == "half_keys" else 2e-5)


@HALF
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scaled_step_equals_an_unscaled_one(half: torch.dtype, backend: str) -> None:
    def step(scale: float) -> list[Tensor]:
        torch.manual_seed(0)
        model = Grounder()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        tap = AttentionTap(model.attention_layers(), visual=slice(1, None))
        with torch.autocast("cpu", half):
            with tap.recording():
                boxes = model(torch.randn(BATCH, 16, 16))
            terms = attention_terms(tap.attention(), BoxRegion(BOXES, (4, 4)), backend=backend)
            loss = AttBalanceLoss(backend=backend)(terms, boxes, BOXES).loss
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients = [p.grad.clone() for p in model.parameters()]
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        return gradients

    for scaled, plain in zip(step(2.0**10), step(1.0), strict=True):
        # Powers of two scale exactly, but for half-precision gradients that fall below the format's range.
        assert relative_error(scaled, plain) < (1e-2 if half == torch.float16 else 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scaler_skips_a_step_whose_attention_overflows_and_the_next_goes_on(backend: str) -> None:
    model = Grounder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    tap = AttentionTap(model.attention_layers(), visual=slice(1, None))

    def step(overflow: float) -> bool:
        """Whether the step changed the model."""
        with torch.autocast("cpu", torch.float16), tap.recording():
            boxes = model(torch.randn(BATCH, 16, 16))
        recorded = tap.attention()
        added = torch.zeros(BATCH, 16, 16)
        added[0, 3, 0] = overflow
        attention = QueryAttention(recorded.query, [key + added for key in recorded.key], recorded.scale)
        terms = attention_terms(attention, BoxRegion(BOXES, (4, 4)), backend=backend)
        optimizer.zero_grad()
        scaler.scale(AttBalanceLoss(backend=backend)(terms, boxes, BOXES).loss).backward()
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert all(p.isfinite().all() for p in model.parameters())
        return any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))

    assert not step(torch.inf)
    assert scaler.get_scale() == 2.0**3
    assert step(0.0)
    assert scaler.get_scale() == 2.0**3
