"""The attention that a network itself uses: a softmax per head over all tokens, words included.

The supervised map is another one: heads averaged before one softmax over the visual tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attbalance_ext.grounding.models import GroundingModel


class UsedAttention:
    """Reads the object query's attention, as ``nn.MultiheadAttention`` computes it, in every layer of a model."""

    def __init__(self, model: GroundingModel) -> None:
        self._modules, self._visual = model.object_attention()
        self._weights: list[Tensor | None] = [None] * len(self._modules)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward pass that runs inside, in evaluation mode."""
        handles = [
            module.register_forward_hook(partial(self._observe, layer), with_kwargs=True)
            for layer, module in enumerate(self._modules)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def weights(self) -> Tensor:
        """(L, B, N): the recorded attention to each visual token, heads averaged; with the words' it sums to 1."""
        recorded = [weights for weights in self._weights if weights is not None]
        if len(recorded) < len(self._modules):
            raise RuntimeError("no forward pass was recorded in which every layer ran")
        self._weights = [None] * len(self._modules)
        return torch.stack(recorded)

    @torch.no_grad()
    def _observe(
        self, layer: int, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any
    ) -> None:
        query, key, *_rest = args
        # The module's own arithmetic once more, for one query, by a way past its hooks.
        weights = nn.MultiheadAttention.forward(
            module, query[:1], key, key, key_padding_mask=kwargs.get("key_padding_mask"), need_weights=True
        )[1]
        assert weights is not None
        self._weights[layer] = weights[:, 0, self._visual]
