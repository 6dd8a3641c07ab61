"""The tap's terms and gradients against explicit projections and head-averaged attention, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import DOUBLE
from helpers_hosts import Host, captured_inputs, explicit_map, explicit_scores, explicit_terms, relative_error
from helpers_pairwise import case_id, pairwise
from torch import Tensor

from attbalance_ext import AttentionTap, attention_map, attention_terms

BATCH, TOKENS, MEMORY, WIDTH, MEMORY_WIDTH = 3, 14, 12, 16, 10
BOUND = 1e-9

FACTORS: dict[str, list[Any]] = {
    "layout": ["batch_first", "sequence_first"],
    "source": ["self", "cross", "cross_kdim"],
    "call": ["keyword", "positional"],
    "bias": ["bias", "no_bias"],
    "extra": ["plain", "bias_kv", "zero_attn"],
    "mask": ["no_mask", "bool", "float_inf", "float_min"],
    "visual": ["all", "middle", "tail", "every_second"],
    "query": [0, 5, -1],
    "heads": [1, 4],
}
VISUAL = {
    "all": slice(None),
    "middle": slice(3, 11),
    "tail": slice(-7, None),
    "every_second": slice(1, None, 2),
}


def padding_mask(kind: str, tokens: int) -> tuple[Tensor | None, Tensor]:
    """What the host is given, and which tokens (B, S) that hides; every sample keeps tokens in every visual slice."""
    hidden = torch.zeros(BATCH, tokens, dtype=torch.bool)
    if kind == "no_mask":
        return None, hidden
    hidden[0, -3:] = True
    hidden[1, 4] = hidden[1, 6] = True
    if kind == "bool":
        return hidden, hidden
    low = -torch.inf if kind == "float_inf" else torch.finfo(torch.float64).min
    return torch.zeros(BATCH, tokens, dtype=torch.float64).masked_fill(hidden, low), hidden


@pytest.mark.parametrize("backend", DOUBLE)
@pytest.mark.parametrize("case", pairwise(FACTORS), ids=case_id)
def test_terms_and_gradients_equal_the_explicit_computation(case: dict[str, Any], backend: str) -> None:
    visual, index = VISUAL[case["visual"]], case["query"]
    options: dict[str, Any] = {
        "width": WIDTH,
        "heads": case["heads"],
        "positional": case["call"] == "positional",
        "batch_first": case["layout"] == "batch_first",
        "bias": case["bias"] == "bias",
        "add_bias_kv": case["extra"] == "bias_kv",
        "add_zero_attn": case["extra"] == "zero_attn",
    }
    if case["source"] == "cross_kdim":
        options |= {"kdim": MEMORY_WIDTH, "vdim": MEMORY_WIDTH}
    host = Host(**options).double()
    momentum_host = copy.deepcopy(host)
    with torch.no_grad():
        for parameter in momentum_host.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))

    tokens = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    memory = None
    if case["source"] != "self":
        width = MEMORY_WIDTH if case["source"] == "cross_kdim" else WIDTH
        memory = torch.randn(BATCH, MEMORY, width, dtype=torch.float64, requires_grad=True)
    mask, hidden = padding_mask(case["mask"], TOKENS if memory is None else MEMORY)
    region = torch.rand(BATCH, hidden.shape[1], dtype=torch.float64)[:, visual]
    region[:, 2:] *= torch.rand_like(region[:, 2:]) > 0.5  # zeros too, but never an empty region

    tap, momentum_tap = (AttentionTap(list(h.layers), query=index, visual=visual) for h in (host, momentum_host))
    with tap.recording(), captured_inputs(host.layers) as inputs:
        host(tokens, memory, mask)
    with momentum_tap.recording(), captured_inputs(momentum_host.layers) as momentum_inputs, torch.no_grad():
        momentum_host.eval()(tokens, memory, mask)
    attention, teacher = tap.attention(), momentum_tap.attention()

    def explicit_maps(layers: Any, inputs: Any) -> list[Tensor]:
        scores = [explicit_scores(layer, x, index)[:, visual] for layer, x in zip(layers, inputs, strict=True)]
        return [explicit_map(s, hidden[:, visual]) for s in scores]

    maps = explicit_maps(host.layers, inputs)
    truth = explicit_terms(maps, region, explicit_maps(momentum_host.layers, momentum_inputs))
    terms = attention_terms(attention, region, teacher=teacher, backend=backend)

    assert relative_error(attention_map(attention), torch.stack(maps)) < BOUND
    for actual, expected in zip(terms[:3], truth[:3], strict=True):
        assert relative_error(actual, expected) < BOUND
    assert terms.valid.tolist() == truth.valid.tolist()

    # The layer inputs themselves too: the chain through the first layer would hide an error in a later one's.
    leaves = [tokens, *([] if memory is None else [memory]), *(x for pair in inputs for x in pair)]
    leaves += [parameter for _, parameter in host.layers.named_parameters()]
    weights = torch.randn(3, *truth.rac.shape, dtype=torch.float64)

    def gradients(terms: Any) -> tuple[Tensor | None, ...]:
        objective = sum((w * term).sum() for w, term in zip(weights, terms[:3], strict=True))
        return torch.autograd.grad(objective, leaves, retain_graph=True, allow_unused=True)

    reached = 0
    for actual, expected in zip(gradients(terms), gradients(truth), strict=True):
        if expected is None:
            assert actual is None
            continue
        assert actual is not None
        assert relative_error(actual, expected) < BOUND
        reached += 1
    assert reached >= 3  # the tokens and both projections at least


def test_the_gradient_reaches_every_projection_by_name() -> None:
    """Not only equal to the truth: there, and not zero."""
    host = Host(layers=1, kdim=10, vdim=10, batch_first=True).double()
    tap = AttentionTap(list(host.layers))
    tokens, memory = torch.randn(2, 5, 16).double(), torch.randn(2, 7, 10).double()
    with tap.recording():
        host(tokens, memory)
    region = torch.zeros(2, 7, dtype=torch.float64)
    region[:, :3] = 1
    attention_terms(tap.attention(), region).rac.sum().backward()
    layer = host.layers[0]
    width = layer.embed_dim
    assert layer.q_proj_weight.grad.norm() > 1e-3
    assert layer.k_proj_weight.grad.norm() > 1e-3
    assert layer.in_proj_bias.grad[:width].norm() > 1e-3
    assert layer.in_proj_bias.grad[width:].norm() == 0  # the softmax drops b_k; b_v takes no part
    assert layer.v_proj_weight.grad is None
