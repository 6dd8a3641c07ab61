"""The terms and gradients of all rows at once, in float64, by the equations in the form that loses no digits.

Written from the equations, not from the reference: no autograd, no backend's code but the region's weights.

A result may be wrong by `BOUND` of itself, `FLOOR` of its natural size (both of helpers.py, by dtype) and the noise:
what rounding of the scores, in the dtype of the arithmetic, makes of it. In float32 that is 2e-5 of a term or of the
norm of a row's gradient, as long as the products that a score is the sum of stay below 20; where they reach 1e4,
0.5 % of the natural size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from helpers_attention import Problem
from torch import Tensor

TERMS = ("in_box", "rac", "mrc")

# Scores are sums of D products in the arithmetic's dtype: the multiple of its epsilon, times the sum of the products'
# sizes, by which a score may be wrong.
_SCORE_ERROR = 4.0
_MATTERS = 1e-9  # a share of probability below this is too small for its error to show


@dataclass
class Truth:
    """Terms (L, B). natural: the size of each result without cancellation; noise: what errors of the scores may make
    of it, both (L, B). decided: (L, B), False where the row's gradients may or may not be NaN: something is not finite
    in it, in a term that the loss does not use."""

    in_box: Tensor
    rac: Tensor
    mrc: Tensor
    valid: Tensor
    by_score: Tensor  # (L, B, N)
    query: Tensor  # (L, B, D)
    key: Tensor  # (L, B, N, D)
    scale: Tensor  # (L, 1)
    broken: Tensor  # (L, B): every gradient is NaN
    padded: Tensor  # (B, N)
    decided: Tensor
    natural: dict[str, Tensor]
    noise: dict[str, Tensor]

    @cached_property
    def grad_query(self) -> Tensor:
        """(L, B, D)"""
        gradient = ((self.scale[..., None] * self.by_score)[:, :, None] @ self.key)[:, :, 0]
        return torch.where(self.broken[..., None], torch.nan, gradient)

    @cached_property
    def grad_key(self) -> Tensor:
        """(L, B, N, D)"""
        gradient = (self.scale[..., None] * self.by_score)[..., None] * self.query[:, :, None]
        return torch.where((self.broken[..., None] & ~self.padded)[..., None], torch.nan, gradient)


def truth_of(problem: Problem, used: tuple[str, ...]) -> Truth:
    """used: the terms that the loss is made of."""
    dtype = problem.incoming[0].dtype
    m, padded, region_broken = _region(problem, dtype)
    valid = (m > 0).any(-1) | region_broken
    alive = ~padded.all(-1)
    query, key, size, scores, student_broken = _scores(problem.query, problem.key, problem.scale, padded)
    log_p = _log_softmax(scores, padded)
    p = log_p.exp()
    t, x, teacher_broken = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(student_broken)
    teacher_size = torch.zeros_like(size)
    if problem.teacher is not None:
        teacher = problem.teacher
        # Rounded to the arithmetic's dtype, as every backend takes them.
        rounded = [[tensor.to(dtype) for tensor in tensors] for tensors in (teacher.query, teacher.key)]
        _, _, teacher_size, teacher_scores, teacher_broken = _scores(*rounded, teacher.scale, padded)
        log_t = _log_softmax(teacher_scores, padded)
        t, x = log_t.exp(), torch.where(padded, 0.0, log_p - log_t)

    has_region = valid & ~region_broken
    log_m = m.log()
    log_in = torch.where(has_region, (log_p + log_m).logsumexp(-1), 0.0)
    in_box = torch.where(has_region, (p * m).sum(-1), 0.0)
    out_box = (p * (1 - m)).sum(-1)
    rac = torch.where(has_region, torch.where(out_box < 0.5, -2 * torch.log1p(-out_box), -2 * log_in), 0.0)
    p_in = torch.where(has_region[:, None] & (m > 0), (log_p + log_m - log_in[..., None]).exp(), 0.0)
    near = x.abs() < 1
    x_near = torch.where(near, x, 0.0)
    mrc = torch.where(near, t * _exp_remainder(x_near), p - t - t * x).masked_fill(padded, 0).sum(-1)

    g_in, g_rac, g_mrc = (
        g.double() if name in used else torch.zeros_like(g, dtype=torch.float64)
        for name, g in zip(TERMS, problem.incoming, strict=True)
    )
    a = torch.where(has_region, 2 * g_rac - g_in * in_box, 0.0)
    a_size = torch.where(has_region, 2 * g_rac.abs() + g_in.abs() * in_box, 0.0)
    if problem.teacher is None:
        g_mrc = torch.zeros_like(g_mrc)
    p_out = p * (1 - m)
    towards_box = p_out - out_box[..., None] * p_in
    towards_teacher = torch.where(near, t * torch.expm1(x_near), p - t)
    by_score = (a[..., None] * towards_box + g_mrc[..., None] * towards_teacher).masked_fill(padded, 0)
    by_score_size = a_size[..., None] * (p_out + out_box[..., None] * p_in) + g_mrc.abs()[..., None] * (p + t)

    # The scores' errors, as far as they are of tokens that count.
    counts = (p > _MATTERS) | (p_in > _MATTERS)
    rounding = torch.where(counts | (t > _MATTERS), size + teacher_size + log_p.abs() * counts, 0.0).nan_to_num(0, 0, 0)
    error = torch.expm1(_SCORE_ERROR * torch.finfo(dtype).eps * rounding.amax(-1))
    distance = (t * x.abs()).masked_fill(padded, 0).sum(-1)
    scale = torch.tensor(problem.scale, dtype=torch.float64)[:, None]
    natural = {
        "in_box": in_box,
        "rac": rac,
        "mrc": distance + 1e-6,
        "query": scale.abs() * (by_score_size * key.norm(dim=-1)).sum(-1),
        "key": scale.abs() * by_score_size.norm(dim=-1) * query.norm(dim=-1),
    }
    # Numbers that are not normal may be rounded or 0: on the way to a gradient, too, where much multiplies them.
    tiny = torch.finfo(dtype).tiny
    lost = tiny * scale.abs() * (2 * g_rac.abs() + g_in.abs() + g_mrc.abs())
    noise = {
        "in_box": error * 2 * in_box + tiny,
        "rac": error * 2 * rac + tiny,
        "mrc": error * ((p - t).abs().sum(-1) + 4 * distance + error) + tiny,
        "query": error * natural["query"] + lost * key.norm(dim=-1).sum(-1),
        "key": error * natural["key"] + lost * query.norm(dim=-1) * math.sqrt(key.shape[2]),
    }

    uses_region = ("in_box" in used or "rac" in used) & valid
    uses_teacher = ("mrc" in used and problem.teacher is not None) & alive
    broken = (uses_region & (student_broken | region_broken)) | (uses_teacher & (student_broken | teacher_broken))
    decided = broken | ~(student_broken | region_broken | teacher_broken)
    unknown = valid & (student_broken | region_broken)
    in_box, rac = (torch.where(unknown, torch.nan, term) for term in (in_box, rac))
    mrc = torch.where(alive & (student_broken | teacher_broken), torch.nan, mrc)
    if problem.teacher is None:
        mrc = torch.zeros_like(mrc)
    return Truth(in_box, rac, mrc, valid, by_score, query, key, scale, broken, padded, decided, natural, noise)


def _region(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """m (B, N) in [0, 1], 0 at padding; padding (B, N); samples with a weight that is NaN (B,)."""
    weights = problem.region if isinstance(problem.region, Tensor) else problem.region.mask()
    weights = weights.to(dtype).double()
    padded = torch.zeros_like(weights, dtype=torch.bool) if problem.padding is None else problem.padding
    m = weights.clamp(0, 1).masked_fill(padded, 0)
    return m.nan_to_num(0.0), padded, m.isnan().any(-1)


def _scores(
    query: list[Tensor] | tuple[Tensor, ...],
    key: list[Tensor] | tuple[Tensor, ...],
    scale: list[float] | tuple[float, ...],
    padded: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """query (L, B, D), key (L, B, N, D), sizes of the scores' sums and scores (L, B, N), rows that are not finite
    (L, B); 0 at padding and in such rows."""
    q = torch.stack([tensor.detach().double() for tensor in query])
    k = torch.stack([tensor.detach().double() for tensor in key]).masked_fill(padded[..., None], 0)
    factor = torch.tensor(scale, dtype=torch.float64)[:, None, None]
    scores = factor * (k @ q[..., None])[..., 0]
    broken = (~scores.isfinite() & ~padded).any(-1)
    q = torch.where((broken | padded.all(-1))[..., None], 0.0, q)
    k = torch.where(broken[..., None, None], 0.0, k)
    scores = scores.masked_fill(broken[..., None] | padded, 0)
    size = factor.abs() * (k.abs() @ q.abs()[..., None])[..., 0]
    return q, k, size, scores, broken


def _log_softmax(scores: Tensor, padded: Tensor) -> Tensor:
    """-inf at padding, NaN nowhere: all -inf where everything is padding."""
    log_p = scores.masked_fill(padded, -torch.inf)
    log_sum = log_p.logsumexp(-1, keepdim=True)
    return torch.where(log_sum.isinf(), -torch.inf, log_p - log_sum)


def _exp_remainder(x: Tensor) -> Tensor:
    """e^x - 1 - x where |x| < 1, without cancellation near 0."""
    series = torch.zeros_like(x)
    for n in range(12, 1, -1):
        series = (1 + series) * x / n
    return torch.where(x.abs() < 0.1, series * x, torch.expm1(x) - x)
