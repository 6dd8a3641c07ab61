"""What the Triton kernels of `attention_terms` share: layers in tuples, region weights, which tokens count."""

from __future__ import annotations

import triton
import triton.language as tl

from attbalance_ext.kernels.attention_terms.reference import RULES

_TOUCH, _CENTER, _COVERAGE, _NEAREST = (tl.constexpr(code) for code in range(len(RULES)))


@triton.jit
def of_layer(values, layer):
    """values[layer] of a tuple."""
    chosen = values[0]
    for other in tl.static_range(1, len(values)):
        chosen = tl.where(layer == other, values[other], chosen)
    return chosen


@triton.jit
def cell_weight(center, extent, cells: tl.constexpr, cell, rule: tl.constexpr):
    """Weight of cells on one axis, in the reference's order of operations. NaN gives 0."""
    half = extent * 0.5
    lo, hi, j = (center - half) * cells, (center + half) * cells, cell.to(tl.float32)
    if rule == _CENTER:
        return tl.where((lo <= j + 0.5) & (j + 0.5 < hi), 1.0, 0.0)
    if rule == _NEAREST:
        return tl.where((lo <= j) & (j < hi), 1.0, 0.0)
    overlap = tl.where(j + 1 < hi, j + 1, hi) - tl.where(j > lo, j, lo)  # a NaN bound survives both selections
    if rule == _TOUCH:
        return tl.where(overlap > 1e-3, 1.0, 0.0)
    return tl.where(overlap > 0, overlap, 0.0)


@triton.jit
def region_weight(region, b, token, tokens, live, grids: tl.constexpr, rule: tl.constexpr):
    """m of tokens as given: not clamped, perhaps NaN; 0 where not `live`. grids: (first token, rows, columns) each."""
    if len(grids) == 0:
        weight = tl.load(region + b.to(tl.int64) * tokens + token, mask=live, other=0.0)
    else:
        box = region + b.to(tl.int64) * 4
        x, y, w, h = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
        weight = tl.zeros_like(token).to(tl.float32)
        for g in tl.static_range(len(grids)):
            cell = token - grids[g][0]
            row = cell_weight(y, h, grids[g][1], cell // grids[g][2], rule)
            column = cell_weight(x, w, grids[g][2], cell % grids[g][2], rule)
            weight = tl.where((cell >= 0) & (cell < grids[g][1] * grids[g][2]), row * column, weight)
        weight = tl.where(live, weight, 0.0)
    return weight


@triton.jit
def clamped(weight):
    """To [0, 1]; NaN, which only reaches A_in and RAC, as 0."""
    return tl.where(weight > 0, tl.where(weight < 1, weight, 1.0), 0.0)


@triton.jit
def live_tokens(padding, b, token, end, tokens):
    """Whether tokens count: before `end`, and not padding."""
    live = token < end
    if padding is not None:
        live = live & (tl.load(padding + b.to(tl.int64) * tokens + token, mask=live, other=1) == 0)
    return live


@triton.jit
def load_query(query, b, column, dim: tl.constexpr):
    return tl.load(query + b.to(tl.int64) * dim + column, mask=column < dim, other=0.0)


@triton.jit
def exp_remainder(x):
    """(e^x - 1 - x) / x^2 for |x| <= 1, without cancellation: the power series, up to x^9 / 11!."""
    r = x * (1.0 / 39916800) + 1.0 / 3628800
    r = r * x + 1.0 / 362880
    r = r * x + 1.0 / 40320
    r = r * x + 1.0 / 5040
    r = r * x + 1.0 / 720
    r = r * x + 1.0 / 120
    r = r * x + 1.0 / 24
    r = r * x + 1.0 / 6
    return r * x + 0.5
