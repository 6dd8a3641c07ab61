"""PyTorch's own encoder under a tap: every layout, training and evaluation, and the nested tensors of its fast path."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from helpers_hosts import captured_inputs, explicit_map, explicit_scores, relative_error
from torch import Tensor, nn

from attbalance_ext import AttentionTap, QueryAttention, attention_map

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),  # layouts that rule nested tensors out
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]

BATCH, TOKENS, WIDTH = 3, 12, 16
VISUAL = slice(2, 11)


def encoder(*, batch_first: bool = True, norm_first: bool = False) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, dropout=0.0, batch_first=batch_first, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 3).double()


def lengths(*numbers: int) -> Tensor:
    """A padding mask (B, S) that leaves the first tokens of each sample."""
    return torch.arange(TOKENS) >= torch.tensor(numbers)[:, None]


def layers_of(model: nn.TransformerEncoder) -> list[nn.MultiheadAttention]:
    return [layer.self_attn for layer in model.layers]


def record(model: nn.TransformerEncoder, tokens: Tensor, mask: Tensor | None, **tap: object) -> QueryAttention:
    tap = AttentionTap(layers_of(model), **{"visual": VISUAL, **tap})  # type: ignore[arg-type]
    try:
        with tap.recording():
            model(tokens, src_key_padding_mask=mask)
        return tap.attention()
    finally:
        tap.remove()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("mode", ["train", "eval", "eval_no_grad"])
@pytest.mark.parametrize("mask", [None, lengths(12, 7, 9)], ids=["no_mask", "mask"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post_norm", "pre_norm"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "sequence_first"])
def test_the_map_equals_the_explicit_one(
    tokens: Tensor, batch_first: bool, norm_first: bool, mask: Tensor | None, mode: str
) -> None:
    model = encoder(batch_first=batch_first, norm_first=norm_first).train(mode == "train")
    if not batch_first:
        tokens = tokens.transpose(0, 1)
    # The truth comes from a pass with gradients, which no fast path takes.
    with captured_inputs(layers_of(model)) as inputs:
        model(tokens, src_key_padding_mask=mask)
    hidden = None if mask is None else mask[:, VISUAL]
    truth = torch.stack(
        [
            explicit_map(explicit_scores(layer, x, 0)[:, VISUAL], hidden)
            for layer, x in zip(layers_of(model), inputs, strict=True)
        ]
    )
    with torch.no_grad() if mode == "eval_no_grad" else nullcontext():
        attention = record(model, tokens, mask)
    assert relative_error(attention_map(attention), truth) < 1e-9
    if mask is None:
        assert attention.padding is None
    else:
        assert torch.equal(attention.padding, mask[:, VISUAL])


@pytest.mark.parametrize(
    "mask",
    [lengths(12, 7, 9), lengths(6, 7, 9), lengths(1, 2, 12)],
    ids=["longest_is_full", "all_are_short", "no_visual_token"],
)
def test_nested_input_is_padded_back(tokens: Tensor, mask: Tensor) -> None:
    model = encoder().eval()
    dense = record(model, tokens, mask)
    nested = []
    model.layers[1].self_attn.register_forward_pre_hook(lambda _, args: nested.append(args[0].is_nested))
    with torch.no_grad():
        attention = record(model, tokens, mask)
    assert nested == [True]  # else this test shows nothing
    assert torch.equal(attention.padding, dense.padding)
    assert attention.key[0].shape == dense.key[0].shape
    for layer in range(3):
        assert relative_error(attention.query[layer], dense.query[layer]) < 1e-9
        kept = ~dense.padding
        assert relative_error(attention.key[layer][kept], dense.key[layer][kept]) < 1e-9
    assert relative_error(attention_map(attention), attention_map(dense)) < 1e-9


@pytest.mark.parametrize(
    "tap",
    [{"visual": slice(None)}, {"visual": slice(-9, None)}, {"visual": slice(2, -1)}, {"query": -1}],
    ids=["open", "from_the_end", "to_the_end", "query_from_the_end"],
)
def test_counting_from_the_end_of_nested_input_is_refused(tokens: Tensor, tap: dict[str, object]) -> None:
    """The end of a nested batch is wherever its longest sample ends: other tokens from batch to batch."""
    model = encoder().eval()
    record(model, tokens, lengths(12, 7, 9), **tap)
    with torch.no_grad(), pytest.raises(ValueError, match="nested input has forgotten its padded length"):
        record(model, tokens, lengths(12, 7, 9), **tap)


def test_the_output_under_a_tap_in_the_fast_path(tokens: Tensor) -> None:
    """A hook takes one layer off its fused kernel; the result is the same to rounding, padding included."""
    model = encoder().eval()
    mask = lengths(6, 7, 9)
    with torch.no_grad():
        without = model(tokens, src_key_padding_mask=mask)
        tap = AttentionTap(layers_of(model), visual=VISUAL)
        with tap.recording():
            recorded = model(tokens, src_key_padding_mask=mask)
    assert relative_error(recorded, without) < 1e-12
    assert recorded.shape == without.shape == tokens.shape
