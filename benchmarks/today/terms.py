"""The attention terms from materialised head-averaged scores, as the paper writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def head_average(query: Tensor, key: Tensor) -> Tensor:
    """The supervised scores (B, N) of projected query (B, H, 1, d) and key (B, H, N, d): mean over heads of q.k."""
    scores = (query @ key.transpose(-1, -2)) / math.sqrt(query.shape[-1])  # (B, H, 1, N)
    return scores.mean(1).squeeze(1)


def attention_terms(
    scores: Sequence[Tensor], mask: Tensor, teacher: Sequence[Tensor] = (), padding: Tensor | None = None
) -> list[Tensor]:
    """[in_box, rac] and, with a teacher's scores, mrc: (L, B) each. scores: L x (B, N). mask, padding: (B, N)."""
    in_box, rac, mrc = [], [], []
    for layer, score in enumerate(scores):
        log_p = _masked(score, padding).log_softmax(-1)
        inside = (log_p.exp() * mask).sum(-1)
        in_box.append(inside)
        rac.append(-2 * inside.log())  # -log(1 - A_out) is -log(A_in) with fewer digits
        if teacher:
            with torch.no_grad():
                t = _masked(teacher[layer], padding).softmax(-1)
            divergence = F.kl_div(log_p, t, reduction="none")
            if padding is not None:
                divergence = divergence.masked_fill(padding, 0)  # 0 times minus infinity
            mrc.append(divergence.sum(-1))
    return [torch.stack(term) for term in (in_box, rac, mrc) if term]


def _masked(scores: Tensor, padding: Tensor | None) -> Tensor:
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores if padding is None else scores.masked_fill(padding, -math.inf)
