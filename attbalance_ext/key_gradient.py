"""The gradient by the keys, added to the host's own gradient in one pass.

By the chain rule dL/dk_j = g_j q with g_j = dL/d(q . k_j): for each sample a matrix (N, D) of rank one. Written out for
every layer it would be as large as the keys, and autograd would read it again to add it to what the host's attention
sends back to the same tensor. :func:`tapped` keeps the two factors apart until then.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def tapped(x: Tensor, query: Tensor, visual: slice, *, batch_first: bool) -> tuple[Tensor, Tensor]:
    """``x`` itself for the host to go on with, and an offset that takes the gradient of its ``visual`` tokens.

    Args:
        x: (T, B, D), or (B, T, D) if ``batch_first``; requires grad.
        query: (B, D), what the visual tokens are multiplied with; float32 (float64).
        visual: which of the T tokens.

    Returns:
        x, and zeros (B, N) in the query's dtype. A gradient (B, N) of the zeros, g, adds ``g_j query`` to the gradient
        of visual token j of ``x``.
    """
    return cast("tuple[Tensor, Tensor]", _Tapped.apply(x, query, visual, batch_first))


class _Tapped(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, query: Tensor, visual: slice, batch_first: bool) -> tuple[Tensor, Tensor]:
        batch, tokens = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
        return x.view_as(x), query.new_zeros(batch, len(range(tokens)[visual]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, query, ctx.visual, ctx.batch_first = inputs
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor | None, factor: Tensor | None) -> tuple[Tensor | None, ...]:
        if factor is None:
            return incoming, None, None, None
        (query,) = ctx.saved_tensors
        if incoming is None:
            incoming = factor.new_zeros(ctx.shape, dtype=ctx.dtype)
        return _add_outer(incoming, factor, query, ctx.visual, ctx.batch_first), None, None, None


def _add_outer(gradient: Tensor, factor: Tensor, query: Tensor, visual: slice, batch_first: bool) -> Tensor:
    """``gradient`` plus ``factor_j query`` at its visual tokens, rounded once to its dtype.

    A new tensor: autograd may have given the old one to others too.
    """
    factor, query = factor[..., None], query[:, None]  # (B, N, 1), (B, 1, D)
    if not batch_first:
        factor, query = factor.transpose(0, 1), query.transpose(0, 1)
    axis = 1 if batch_first else 0
    chosen = (slice(None),) * axis + (visual,)
    if torch.is_grad_enabled():  # somebody wants second derivatives, which out= does not give
        total = gradient.clone()
        total[chosen] = torch.addcmul(gradient[chosen], factor, query).to(gradient.dtype)
        return total
    total = torch.empty_like(gradient)
    start, stop, step = visual.indices(gradient.shape[axis])
    if step == 1 and start < stop:
        total.narrow(axis, 0, start).copy_(gradient.narrow(axis, 0, start))
        after = gradient.shape[axis] - stop
        total.narrow(axis, stop, after).copy_(gradient.narrow(axis, stop, after))
    else:
        total.copy_(gradient)
    torch.addcmul(gradient[chosen], factor, query, out=total[chosen])
    return total
