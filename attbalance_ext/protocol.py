"""What a tap is to those who use one: the teacher, a trainer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor

from attbalance_ext.attention import QueryAttention


@runtime_checkable
class Tap(Protocol):
    """Reads one object query's attention out of a model's forward pass.

    :class:`AttentionTap` is one, `attbalance_ext.integrations.transformers.TransformersTap` another.
    """

    def recording(self) -> AbstractContextManager[None]:
        """Record the forward pass that runs inside."""
        ...

    def attention(self, query: Tensor | None = None) -> QueryAttention:
        """Hand over the last recording and forget it. query: (B,) int64, which of several queries is the object's."""
        ...

    def remove(self) -> None:
        """Leave the model as it was."""
        ...
