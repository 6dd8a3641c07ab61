"""`attention_terms` in plain PyTorch: the specification every kernel is tested against (AttBalance, section 3).

Notation: s scores, p softmax over tokens that are not padding, m region weight, t the teacher's p;
A_in = sum_j p_j m_j, A_out = sum_j p_j (1 - m_j), RAC = -2 log A_in, MRC = KL(t || p).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RULES = ("touch", "center", "coverage", "nearest")
_TOUCH = 1e-3  # of a cell: rounding of box edges must not add a row of cells


class AttentionTerms(NamedTuple):
    """in_box (A_in), rac, mrc: (L, B), unreduced; valid: (B,) bool, False where the region has no token."""

    in_box: Tensor
    rac: Tensor
    mrc: Tensor
    valid: Tensor


def attention_terms(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    scale: Sequence[float],
    region: Tensor,
    padding: Tensor | None,
    teacher_query: Sequence[Tensor] = (),
    teacher_key: Sequence[Tensor] = (),
    teacher_scale: Sequence[float] = (),
) -> AttentionTerms:
    """RAC, MRC and A_in of L layers, differentiable in query and key.

    query: L x (B, D) in the arithmetic's dtype. key: L x (B, N, D), any floating dtype. region: (B, N) weights.
    padding: (B, N) bool or None. The teacher's lists are empty when there is none.
    """
    with torch.autocast(region.device.type, enabled=False):
        padded = torch.zeros_like(region, dtype=torch.bool) if padding is None else padding
        m = torch.where(padded, 0, region.clamp(0, 1))
        valid = (m != 0).any(-1)
        log_p = _log_softmax(_scores(query, key, scale, padding), padded)
        log_in = _log_in_box(log_p, m, valid)
        in_box = torch.where(valid, log_in.exp(), 0)
        rac = torch.where(valid, -2 * log_in, 0)
        if teacher_key:
            with torch.no_grad():
                log_t = _log_softmax(_scores(teacher_query, teacher_key, teacher_scale, padding), padded)
            mrc = torch.where(padded.all(-1), 0, _kl_divergence(log_t, log_p, padded))
        else:
            mrc = in_box.masked_fill(torch.ones_like(in_box, dtype=torch.bool), 0)  # differentiable, like the others
        return AttentionTerms(in_box, rac, mrc, valid)


def _log_in_box(log_p: Tensor, m: Tensor, valid: Tensor) -> Tensor:
    """log A_in, (L, B), without cancellation at either end; meaningless where the region is empty."""
    # Where the region is empty nothing may flow back, not even 0 * NaN: the where() cuts the graph before the
    # arithmetic.
    log_p = torch.where(valid[:, None], log_p, 0)
    p_out = (log_p.exp() * (1 - m)).sum(-1)
    mostly_in = p_out < 0.5
    log_m = torch.where(valid[:, None], m, 1).log()
    return torch.where(
        mostly_in, torch.log1p(-torch.where(mostly_in, p_out, 0)), torch.logsumexp(log_p + log_m, dim=-1)
    )


def _kl_divergence(log_t: Tensor, log_p: Tensor, padded: Tensor) -> Tensor:
    """KL(t || p) over the tokens, as the sum of t (expm1(x) - x) >= 0 with x = log p - log t."""
    x = torch.where(padded, 0, log_p - log_t)
    t, p = log_t.exp(), log_p.exp()
    near = x < 1
    x_near = torch.where(near, x, 0)
    # Far from 0 the same term as p - t - t x, which needs no exp(x): that overflows where t underflows.
    terms = torch.where(near, t * (torch.expm1(x_near) - x_near), p - t - t * x)
    return torch.where(padded, 0, terms).sum(-1)


def _scores(query: Sequence[Tensor], key: Sequence[Tensor], scale: Sequence[float], padding: Tensor | None) -> Tensor:
    """s = scale * q . k, (L, B, N). NaN where not finite, so that an infinite score cannot pass for a certain one."""
    layers = []
    for q, k, factor in zip(query, key, scale, strict=True):
        k = k.to(q.dtype)
        if padding is not None:  # before the product: 0 * NaN would reach dL/dq
            k = torch.where(padding[..., None], 0, k)
        layers.append(factor * (k @ q[..., None]).squeeze(-1))
    scores = torch.stack(layers)
    return scores + 0 * scores.detach()  # a sum, not a selection: NaN has to reach the gradients too


def _log_softmax(scores: Tensor, padded: Tensor) -> Tensor:
    """log p over the tokens that are not padding; -inf at padding; finite and meaningless where all is padding."""
    dead = padded.all(-1, keepdim=True)
    return scores.masked_fill(padded, -torch.inf).masked_fill(dead, 0).log_softmax(-1)


def attention_map(
    query: Sequence[Tensor], key: Sequence[Tensor], scale: Sequence[float], padding: Tensor | None
) -> Tensor:
    """p, (L, B, N); 0 at padding."""
    with torch.autocast(key[0].device.type, enabled=False):
        scores = _scores(query, key, scale, padding)
        if padding is None:
            return scores.softmax(-1)
        return torch.where(padding, 0, _log_softmax(scores, padding).exp())


def rasterise(boxes: Tensor, grids: Sequence[tuple[int, int]], rule: str) -> Tensor:
    """Region weights (B, N) float32 of boxes (B, 4) float32 cxcywh; the cells of each grid row-major, grids end to
    end."""
    cx, cy, w, h = boxes.unbind(-1)
    weights = []
    for height, width in grids:
        rows = _cells(cy, h, height, rule)
        columns = _cells(cx, w, width, rule)
        weights.append((rows[:, :, None] * columns[:, None, :]).flatten(1))
    return torch.cat(weights, dim=1)


def _cells(center: Tensor, extent: Tensor, n: int, rule: str) -> Tensor:
    """Weights (B, n) of one axis. The order of operations is part of the specification: kernels give the same bits."""
    half = extent / 2
    lo = ((center - half) * n)[:, None]
    hi = ((center + half) * n)[:, None]
    j = torch.arange(n, device=center.device, dtype=center.dtype)
    if rule == "center":
        return ((lo <= j + 0.5) & (j + 0.5 < hi)).to(center.dtype)
    if rule == "nearest":
        return ((lo <= j) & (j < hi)).to(center.dtype)
    overlap = torch.minimum(hi, j + 1) - torch.maximum(lo, j)
    if rule == "touch":
        return (overlap > _TOUCH).to(center.dtype)
    return torch.where(overlap > 0, overlap, 0)  # NaN boxes have no overlap
