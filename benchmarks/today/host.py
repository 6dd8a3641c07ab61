"""A host whose attention is read without a tap: its layers' inputs are kept, and the projections done again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.today.terms import head_average


class Heads(NamedTuple):
    """The projected object query (B, H, 1, d) and visual tokens (B, H, N, d) of one layer."""

    query: Tensor
    key: Tensor


class TodaysHost:
    """Hooks that keep the inputs of a host's sequence-first attention layers, and may make them materialise weights.

    Weights that the layers hand out are after the softmax and over all tokens, text included. The supervised map
    is neither, so query and key are projected again, for the object query and the visual tokens alone, and nobody
    reads the weights. Asking for them all the same is how it is done; without ``materialise`` attention stays fused.
    """

    def __init__(self, layers: Sequence[nn.MultiheadAttention], visual: slice, *, materialise: bool = True) -> None:
        self._visual, self._materialise = visual, materialise
        self._seen: list[tuple[nn.MultiheadAttention, Tensor, Tensor]] = []
        self.padding: Tensor | None = None
        """(B, N) of the last call's visual tokens."""
        self._handles = [layer.register_forward_pre_hook(self._observe, with_kwargs=True) for layer in layers]

    def _observe(
        self, layer: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._seen.append((layer, args[0], args[1]))
        mask = kwargs.get("key_padding_mask")
        self.padding = None if mask is None else mask[:, self._visual]
        if not self._materialise:
            return args, kwargs
        # Averaging the weights over the heads, PyTorch's default, would be work that nobody needs here.
        return args, {**kwargs, "need_weights": True, "average_attn_weights": False}

    def heads(self) -> list[Heads]:
        """The layers' projections, done again; the record is forgotten."""
        seen, self._seen = self._seen, []
        return [_project(layer, query[0], key[self._visual]) for layer, query, key in seen]

    def scores(self) -> list[Tensor]:
        """The supervised scores (B, N) of each layer, averaged over the heads."""
        return [head_average(*heads) for heads in self.heads()]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _project(layer: nn.MultiheadAttention, query: Tensor, key: Tensor) -> Heads:
    """query (B, D), key (N, B, D)."""
    width, heads = layer.embed_dim, layer.num_heads
    weight, bias = layer.in_proj_weight, layer.in_proj_bias
    q = F.linear(query, weight[:width], bias[:width]).unflatten(1, (heads, 1, -1))
    k = F.linear(key, weight[width : 2 * width], bias[width : 2 * width]).unflatten(2, (heads, -1))
    return Heads(q, k.permute(1, 2, 0, 3))
