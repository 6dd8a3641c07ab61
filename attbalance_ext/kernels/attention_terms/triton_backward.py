"""Backward kernel of `attention_terms`: dK, or the factors it is made of, from the scores; dq from the key means."""

from __future__ import annotations

import triton
import triton.language as tl

from attbalance_ext.kernels.attention_terms.triton_pieces import (
    clamped,
    exp_remainder,
    live_tokens,
    load_query,
    of_layer,
    region_weight,
)

_INF = tl.constexpr(float("inf"))


@triton.jit
def _score_gradient(log_p, log_t, m, region, mrc, out_of_box, log_in):
    """dL/ds_j. region: what RAC and A_in together put on p - pin."""
    p = tl.exp(log_p)
    # Outside the exponent may be large; inside, where m is subnormal, only the root does not overflow.
    root = tl.where(m > 0, tl.exp((log_p - log_in) * 0.5), 0.0)
    pin = m * root * root
    gradient = region * (p * (1 - m) - out_of_box * pin)  # p - pin, which keeps its digits where A_in tends to 1
    if log_t is not None:
        x, t = log_p - log_t, tl.exp(log_t)
        gradient += mrc * tl.where(tl.abs(x) < 1, t * (x + x * x * exp_remainder(x)), p - t)
    return gradient


@triton.jit(do_not_specialize=["first_layer", "batch", "tokens"])
def backward(
    query,  # layers of this launch x (B, D) float32
    scale,  # layers x number
    grad_query,  # layers x (B, D) float32, or None
    grad_key,  # layers x (B, N, D), or None
    grad_dot,  # (L, B, N), or None
    key_batch_stride,
    key_token_stride,
    region,  # boxes (B, 4), or weights (B, N)
    padding,  # (B, N) or None
    grad_in_box,  # (L, B)
    grad_rac,  # (L, B)
    grad_mrc,  # (L, B)
    in_box,  # (L, B)
    log_p,  # (L, B, N)
    log_t,  # (L, B, N) or None
    stats,  # (L, B, 4)
    key_means,  # (L, B, 3, D), or None without grad_query
    first_layer,
    batch,
    tokens,
    grids: tl.constexpr,
    rule: tl.constexpr,
    dim: tl.constexpr,
    block_tokens: tl.constexpr,
    block_dim: tl.constexpr,
):
    """dK of some tokens of one row, dL/d(q . k), and dq. Grid: (rows of this launch, tiles of tokens)."""
    layer, b = tl.program_id(0) // batch, tl.program_id(0) % batch
    row = (first_layer * batch + tl.program_id(0)).to(tl.int64)
    a_in, out_of_box = tl.load(in_box + row), tl.load(stats + row * 4 + 2)
    log_in, g_mrc = tl.load(stats + row * 4 + 1), tl.load(grad_mrc + row)
    g_region = tl.where(log_in == -_INF, 0.0, 2 * tl.load(grad_rac + row) - tl.load(grad_in_box + row) * a_in)
    factor, q = of_layer(scale, layer), of_layer(query, layer)

    if grad_query is not None:  # noqa: SIM102 - known at compile time
        if tl.program_id(1) == 0:
            out = of_layer(grad_query, layer) + b.to(tl.int64) * dim
            for first in range(0, dim, block_dim):
                column = first + tl.arange(0, block_dim)
                means = key_means + row * (3 * dim) + column
                inside = tl.load(means, mask=column < dim, other=0.0)
                outside = tl.load(means + dim, mask=column < dim, other=0.0)
                gradient = g_region * (outside - out_of_box * inside)
                if log_t is not None:
                    teacher = tl.load(means + 2 * dim, mask=column < dim, other=0.0)
                    gradient += g_mrc * ((outside + a_in * inside) - teacher)
                tl.store(out + column, factor * gradient, mask=column < dim)

    if grad_key is not None or grad_dot is not None:
        token = tl.program_id(1) * block_tokens + tl.arange(0, block_tokens)
        live = live_tokens(padding, b, token, tokens, tokens)
        m = clamped(region_weight(region, b, token, tokens, live, grids, rule))
        here = row * tokens + token
        logp = tl.load(log_p + here, mask=live, other=0.0)
        logt = None
        if log_t is not None:
            logt = tl.load(log_t + here, mask=live, other=0.0)
        coefficient = factor * _score_gradient(logp, logt, m, g_region, g_mrc, out_of_box, log_in)
        if grad_dot is not None:
            tl.store(grad_dot + here, tl.where(live, coefficient, 0.0), mask=token < tokens)
        if grad_key is not None:
            keys = of_layer(grad_key, layer) + b.to(tl.int64) * key_batch_stride
            place = keys + token.to(tl.int64)[:, None] * key_token_stride
            for first in range(0, dim, block_dim):
                column = first + tl.arange(0, block_dim)
                gradient = coefficient[:, None] * load_query(q, b, column, dim)[None, :]
                gradient = tl.where(live[:, None], gradient, 0.0).to(keys.dtype.element_ty)
                tl.store(place + column[None, :], gradient, mask=(token < tokens)[:, None] & (column < dim)[None, :])
