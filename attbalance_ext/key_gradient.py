"""The gradient by the keys, added to the host's own gradient in one pass.

By the chain rule dL/dk_j = g_j q with g_j = dL/d(q . k_j): for each sample a matrix (N, D) of rank one. Written out for
every layer it would be as large as the keys, and autograd would read it again to add it to what the host's attention
sends back to the same tensor. Here the two factors stay apart until then.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class KeyGradient:
    """The other factor of the keys' gradient, and which tokens are keys.

    query: (B, D), what the keys are multiplied with; set once it is known, before the backward pass.
    """

    def __init__(self, visual: slice, *, batch_first: bool) -> None:
        self.visual, self.batch_first = visual, batch_first
        self.query: Tensor | None = None

    def added_to(self, gradient: Tensor, factor: Tensor) -> Tensor:
        """``gradient`` (T, B, D) or (B, T, D) plus ``factor_j query`` at its visual tokens, rounded once to its dtype.

        A new tensor: autograd may have given the old one to others too.
        """
        assert self.query is not None, "a gradient came back before the layer had run"
        # Where a query is not finite, neither is g, except at padding, where it is 0 and has to make 0.
        query = self.query.nan_to_num(0.0, 0.0, 0.0)[:, None]  # (B, 1, D)
        factor = factor[..., None]  # (B, N, 1)
        if not self.batch_first:
            factor, query = factor.transpose(0, 1), query.transpose(0, 1)
        axis = 1 if self.batch_first else 0
        chosen = (slice(None),) * axis + (self.visual,)
        if torch.is_grad_enabled():  # in a backward pass that makes a graph, which out= cannot be part of
            total = gradient.clone()
            total[chosen] = torch.addcmul(gradient[chosen], factor, query).to(gradient.dtype)
            return total
        total = torch.empty_like(gradient)
        start, stop, step = self.visual.indices(gradient.shape[axis])
        if step == 1 and start < stop:
            total.narrow(axis, 0, start).copy_(gradient.narrow(axis, 0, start))
            after = gradient.shape[axis] - stop
            total.narrow(axis, stop, after).copy_(gradient.narrow(axis, stop, after))
        else:
            total.copy_(gradient)
        torch.addcmul(gradient[chosen], factor, query, out=total[chosen])
        return total


class Interposed(NamedTuple):
    """What stands between a tensor and what the host makes of it."""

    passed: Tensor
    """A view of the tensor, for the host to go on with."""
    offset: Tensor
    """(B, N) zeros. Their gradient is taken for g."""
    key_gradient: KeyGradient


def interpose(x: Tensor, visual: slice, dtype: torch.dtype, *, batch_first: bool) -> Interposed:
    """Take the gradient of the visual tokens of ``x`` in factors.

    Args:
        x: (T, B, D), or (B, T, D) if ``batch_first``; requires grad.
        visual: which of the T tokens are the keys.
        dtype: of the factors, float32 or float64.
    """
    key_gradient = KeyGradient(visual, batch_first=batch_first)
    passed, offset = _Interpose.apply(x, key_gradient, dtype)
    return Interposed(passed, offset, key_gradient)


class _Interpose(torch.autograd.Function):
    """Saves no tensor, so that a recomputation under activation checkpointing may leave it out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, key_gradient: KeyGradient, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        batch, tokens = (x.shape[0], x.shape[1]) if key_gradient.batch_first else (x.shape[1], x.shape[0])
        ctx.key_gradient, ctx.shape, ctx.dtype = key_gradient, x.shape, x.dtype
        ctx.set_materialize_grads(False)
        return x.view_as(x), x.new_zeros((batch, len(range(tokens)[key_gradient.visual])), dtype=dtype)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor | None, factor: Tensor | None) -> tuple[Tensor | None, None, None]:
        if factor is None:
            return incoming, None, None
        if incoming is None:
            incoming = factor.new_zeros(ctx.shape, dtype=ctx.dtype)
        return ctx.key_gradient.added_to(incoming, factor), None, None
