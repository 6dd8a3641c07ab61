"""The gradient by the keys, added to the host's own gradient in one pass.

By the chain rule dL/dk_j = g_j q with g_j = dL/d(q . k_j): for each sample a matrix (N, D) of rank one. Written out for
every layer it would be as large as the keys, and autograd would read it again to add it to what the host's attention
sends back to the same tensor. Here the two factors stay apart until then.

Where query and key are one tensor, the gradient of the query's own token is added there, too. Autograd would write it
out among zeros for all other tokens, and add all of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attbalance_ext.tokens import Tokens


class KeyGradient:
    """The other factor of the keys' gradient, and where it goes.

    query: (B, D), what the keys are multiplied with; set once it is known, before the backward pass.
    """

    def __init__(self, visual: Tokens, queries: Tokens | None, *, batch_first: bool) -> None:
        self.visual, self.queries, self.batch_first = visual, queries, batch_first
        self.query: Tensor | None = None

    def samples(self, x: Tensor) -> Tensor:
        """(B, T, D) of (T, B, D), and back; the same if ``batch_first``."""
        return x if self.batch_first else x.transpose(0, 1)

    def added_to(self, gradient: Tensor, factor: Tensor | None, rows: Tensor | None) -> Tensor:
        """``gradient`` plus ``factor_j query`` at its visual tokens and ``rows`` at its queries.

        A new tensor: autograd may have given the old one to others too. Each sum is rounded once to its dtype.
        """
        given = self.samples(gradient)
        tokens = given.shape[1]
        if torch.is_grad_enabled():  # in a backward pass that makes a graph, which out= cannot be part of
            total = given.clone()
            if factor is not None:
                everywhere = self.visual.spread(factor, tokens)[..., None]
                total = torch.addcmul(total, everywhere, self._query()).to(gradient.dtype)
            if rows is not None:
                assert self.queries is not None
                total = total + self.queries.spread(rows, tokens).to(gradient.dtype)
            return self.samples(total)
        whole = torch.empty_like(gradient)
        total = self.samples(whole)
        if factor is None:
            total.copy_(given)
        else:
            interval = self.visual.interval(tokens)
            if interval is None:
                interval, factor = (0, tokens), self.visual.spread(factor, tokens)
            start, stop = interval
            total[:, :start] = given[:, :start]
            total[:, stop:] = given[:, stop:]
            torch.addcmul(given[:, start:stop], factor[..., None], self._query(), out=total[:, start:stop])
        if rows is not None:
            assert self.queries is not None
            self.queries.of(total).add_(rows)
        return whole

    def _query(self) -> Tensor:
        """(B, 1, D). Where a query is not finite, neither is g, except at padding, where it is 0 and has to make 0."""
        assert self.query is not None, "a gradient came back before the attention was handed over"
        return self.query.nan_to_num(0.0, 0.0, 0.0)[:, None]


class Interposed(NamedTuple):
    """What stands between a tensor and what the host makes of it."""

    passed: Tensor
    """A view of the tensor, for the host to go on with."""
    offset: Tensor
    """(B, N) zeros. Their gradient is taken for g."""
    rows: Tensor | None
    """The query tokens, (B, D) or (B, Q, D), in the factors' dtype."""
    key_gradient: KeyGradient


def interpose(
    x: Tensor, visual: Tokens, dtype: torch.dtype, *, queries: Tokens | None = None, batch_first: bool
) -> Interposed:
    """Take the gradient of the visual tokens of ``x`` in factors, and that of its query tokens by themselves.

    Args:
        x: (T, B, D), or (B, T, D) if ``batch_first``; requires grad.
        visual: which of the T tokens are the keys.
        dtype: of the factors, float32 or float64.
        queries: which of the T tokens the queries are made of, if they are to be handed out.
    """
    if queries is not None and not queries.is_view:
        queries = None
    key_gradient = KeyGradient(visual, queries, batch_first=batch_first)
    passed, offset, rows = _Interpose.apply(x, key_gradient, dtype)
    return Interposed(passed, offset, rows, key_gradient)


class _Interpose(torch.autograd.Function):
    """Saves no tensor, so that a recomputation under activation checkpointing may leave it out."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, key_gradient: KeyGradient, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        samples = key_gradient.samples(x)
        ctx.key_gradient, ctx.shape, ctx.dtype = key_gradient, x.shape, x.dtype
        ctx.set_materialize_grads(False)
        offset = x.new_zeros((samples.shape[0], key_gradient.visual.number(samples.shape[1])), dtype=dtype)
        rows = None if key_gradient.queries is None else key_gradient.queries.of(samples).to(dtype)
        return x.view_as(x), offset, rows

    @staticmethod
    def backward(
        ctx: Any, incoming: Tensor | None, factor: Tensor | None, rows: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        if factor is None and rows is None:
            return incoming, None, None
        if incoming is None:
            some = rows if factor is None else factor
            assert some is not None
            incoming = some.new_zeros(ctx.shape, dtype=ctx.dtype)
        return ctx.key_gradient.added_to(incoming, factor, rows), None, None
