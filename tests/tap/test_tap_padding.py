"""The layers' masks: one for all of them, whichever tensors it lies in."""

from __future__ import annotations

import pytest
import torch
from helpers_sync import no_host_sync
from torch import Tensor, nn

from attbalance_ext import AttentionTap, QueryAttention, attention_map

BATCH, TOKENS = 3, 6


@pytest.fixture
def layers() -> list[nn.MultiheadAttention]:
    return [nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(3)]


def hides(*numbers: int) -> Tensor:
    """The last sample's tokens of these numbers."""
    mask = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    mask[-1, list(numbers)] = True
    return mask


def record(tap: AttentionTap, layers: list[nn.MultiheadAttention], masks: list[Tensor | None]) -> None:
    query, key = torch.randn(BATCH, 2, 8), torch.randn(BATCH, TOKENS, 8)
    with tap.recording():
        for layer, mask in zip(layers, masks, strict=True):
            layer(query, key, key, key_padding_mask=mask)


def attention(layers: list[nn.MultiheadAttention], *masks: Tensor | None) -> QueryAttention:
    tap = AttentionTap(layers, visual=slice(1, None))
    record(tap, layers, list(masks))
    return tap.attention()


def test_one_mask_in_several_tensors(layers: list[nn.MultiheadAttention]) -> None:
    """Of several dtypes, and different where no visual token is."""
    additive = torch.zeros(BATCH, TOKENS).masked_fill(hides(2, 5), -torch.inf)
    expected = attention(layers, *3 * [hides(2, 5)]).padding
    assert torch.equal(expected, hides(2, 5)[:, 1:])
    assert torch.equal(attention(layers, hides(2, 5), additive, hides(0, 2, 5)).padding, expected)
    assert not attention(layers, None, hides(0), torch.zeros(BATCH, TOKENS)).padding.any()
    assert attention(layers, None, None, None).padding is None


@pytest.mark.parametrize("other", [None, hides(2), hides(2, 4, 5)], ids=["none", "fewer", "more"])
def test_layers_with_masks_of_their_own_are_refused(layers: list[nn.MultiheadAttention], other: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"layer\(s\) \[1\] hide other visual tokens .* than layer 2 .* of one kind"):
        attention(layers, hides(2, 4), other, hides(2, 4))


@pytest.mark.parametrize("several", [False, True])
def test_where_the_host_does_not_wait_the_sample_is_nan(
    layers: list[nn.MultiheadAttention], several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tap = AttentionTap(layers, query=slice(None) if several else 0)
    choice = torch.ones(BATCH, dtype=torch.int64) if several else None
    for masks, nan in (([hides(2), hides(3), hides(2)], True), ([hides(2), hides(2), hides(2)], False)):
        record(tap, layers, masks)
        with monkeypatch.context() as patch, no_host_sync():
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            recorded = tap.attention(choice)
        found = attention_map(recorded).isnan()
        assert found[:, -1, [0, 1, 3, 4, 5]].all().item() is nan  # token 2 is hidden, whose share is 0
        assert not found[:, :-1].any()
