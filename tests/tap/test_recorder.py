"""A tap of one's own: what a subclass of Recorder keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attbalance_ext import QueryAttention, Recorder, Tap, attention_map


class OwnTap(Recorder):
    def __init__(self, module: nn.Module, **tokens: object) -> None:
        super().__init__([module], **tokens)
        self.handles.append(module.register_forward_hook(self._read))

    def _read(self, module: nn.Module, args: tuple[Tensor, Tensor], output: Tensor) -> None:
        if self.listening:
            self.keep(0, module, *args, padding=torch.arange(args[1].shape[2]).expand(2, -1) == 3)


class Product(nn.Module):
    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return query.sum() + key.sum()


def test_heads_are_kept_as_from_heads_takes_them() -> None:
    module = Product()
    tap = OwnTap(module, query=-1, visual=slice(1, None))
    assert isinstance(tap, Tap)
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8)  # two query heads for each key head
    with tap.recording():
        module(q, k)
    module(q, k)  # not listened to
    found = tap.attention()
    padding = (torch.arange(1, 6) == 3).expand(2, -1)
    repeated = k.repeat_interleave(2, 1)[:, :, 1:]
    truth = QueryAttention.from_heads([q[:, :, -1]], [repeated], padding=padding)
    torch.testing.assert_close(attention_map(found), attention_map(truth))
    tap.remove()
    assert not module._forward_hooks


def test_tokens_that_the_layer_has_not() -> None:
    module = Product()
    tap = OwnTap(module, visual=[2, 9])
    message = r"layer 0, Product: visual must index .* 6 key tokens, got 9; for the tokens from 2 on give slice\(2, 9\)"
    with pytest.raises(ValueError, match=message), tap.recording():
        module(torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8))
