"""The bounds. Each is an expression that the tests evaluate and that docs/numerics.md prints, so they cannot differ.

Names stand for tensors in float64: (L, B, 1) for what a row has one of, (L, B, N) for tokens, (L, B, D) for channels;
in the objective (B,). `attention_names` and `loss_names` make them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from helpers_attention import Problem, Solution
from helpers_loss import LossProblem, LossSolution
from torch import Tensor

from attbalance_ext import AttBalanceConfig


class Bound(NamedTuple):
    """What a quantity may be wrong by: rounding, and what is lost below the smallest numbers."""

    title: str
    rounding: str
    underflow: str = "0"


# One after the other; a later one may use those before it.
DEFINITIONS = {
    "δ": "(n + 4) * u * σ",
    "δ_t": "(n + 4) * u * σ_t",
    "ε": "(N + 16 + 2 * RAC) * u + N * ω / Σ_in",
    "η": "2 * δ + ε",
    "η_t": "2 * δ_t + ε",
    "a": "2 * abs(g_rac) + abs(g_in) * A_in",
}
ATTENTION = {
    "in_box": Bound("A_in", "A_in * (2 * δ * A_out + ε)", "N * ω"),
    "rac": Bound("RAC", "4 * δ * A_out + 2 * ε * min(1, A_out / A_in)", "2 * N * ω"),
    "mrc": Bound("MRC", "(η + η_t) * (sum(abs(p - t)) + 8 * MRC) + (η + η_t) ** 2", "N * ω * (4 + 2 * σ + 2 * σ_t)"),
    "dot": Bound(
        "g, by q . k",
        "2 * scale * (η * a * (p_out + A_out * p_in) + (η + η_t) * abs(g_mrc) * (p + t))",
        "ω + N * ω * scale * (a + abs(g_mrc))",
    ),
    "key": Bound("dK, by keys", "outer(Δg, abs(q)) + u_k * abs(dK)", "ω_k"),
    "query": Bound(
        "dq, by queries",
        "2 * scale * (η * a * (K_out + A_out * K_in)"
        " + (η + η_t) * abs(g_mrc) * (K_out + A_in * K_in + K_t)) + u_k * abs(dq)",
        "ω_k + N * ω * (1 + scale * (a / Σ_in + (a + abs(g_mrc)) * K_max))",
    ),
}

LOSS_DEFINITIONS = {
    "Δ": "(2 * L + 12) * u * (abs(w_rac) * R + abs(w_mrc) * M)",
    "G": "(M_x * H_x + M_y * H_y) / union",
    "P": "3 * (H_x + H_y) / union",
    "Δ_adw": "y * (1 - y) * Δ + Δ ** 2 + 4 * u",
    "Δ_odw": "4 * u * (1 + box_ratio)",
    "Δ_box": "alpha_l1 * (S + 4) * u * l1 + alpha_giou * sum(min(2, 32 * u * G) + 8 * u) + 4 * u * box",
}
LOSS = {
    "rho": Bound("rho, given A_in and IoU", "2 * u"),
    "rac": Bound("RAC over layers", "(2 * L + 8) * u * R"),
    "mrc": Bound("MRC over layers", "(L + 1) * u * M"),
    "attention": Bound("L_ar", "Δ"),
    "adw": Bound("W_adw", "Δ_adw"),
    "odw": Bound("W_odw", "Δ_odw"),
    "l1": Bound("L1", "(S + 4) * u * l1"),
    "iou": Bound("IoU", "min(1, 16 * u * G_last)"),
    "giou": Bound("1 - GIoU", "sum(min(2, 32 * u * G) + 8 * u)"),
    "box": Bound("the box loss", "Δ_box"),
    "loss": Bound(
        "L",
        "mean(abs(alpha_ar) * Δ + odw * adw * Δ_box + 2 * box * (Δ_adw + Δ_odw))"
        " + (B + 4) * u * mean(abs(alpha_ar) * (abs(w_rac) * R + abs(w_mrc) * M) + odw * adw * box)",
    ),
    "grad_rac": Bound("by RAC", "abs(w_rac) / B * r * ((2 * L + 16) * u * (abs(alpha_ar) + odw * box) + Δ_y)", "ω"),
    "grad_mrc": Bound("by MRC", "abs(w_mrc) / B * ((2 * L + 16) * u * (abs(alpha_ar) + odw * box) + Δ_y)", "ω"),
    "grad_pred": Bound(
        "by predicted boxes",
        "odw * adw / B * u * (8 * alpha_l1 + 64 * alpha_giou * G * P)"
        " + 2 * (Δ_adw + Δ_odw) / B * (alpha_l1 + alpha_giou * P)",
    ),
}
LOSS_DEFINITIONS["Δ_y"] = "odw * (Δ_box * y * (1 - y) + box * (Δ_adw + Δ_odw))"

# Roundings of the arithmetic, one after the other, between a product q_d k_jd and the more exact sum of the score.
PARTIAL_SUM: dict[str, Callable[[int], int]] = {
    "reference": lambda width: width + 1,
    "cpu": lambda width: min(width, 16) + 1,
    "cuda": lambda width: 8 * -(-width // 256) + 1,
    "triton": lambda width: min(width, 8) + 1,
}
PARTIAL_SUM_TEXT = {"reference": "D + 1", "cpu": "min(D, 16) + 1", "cuda": "8 ⌈D / 256⌉ + 1", "triton": "min(D, 8) + 1"}


def roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def smallest(dtype: torch.dtype, flushed: bool) -> float:
    """The spacing of the numbers around 0; with subnormal numbers flushed to 0, the smallest normal one."""
    kind = torch.finfo(dtype)
    return kind.tiny if flushed else kind.tiny * kind.eps


def attention_bounds(problem: Problem, truth: Solution, backend: str, *, flushed: bool = False) -> dict[str, Tensor]:
    """By quantity: (L, B), the gradients (L, B, N), (L, B, N, D) and (L, B, D)."""
    names = attention_names(problem, truth, backend, flushed=flushed)
    for name, expression in DEFINITIONS.items():
        names[name] = _evaluate(expression, names)
    found = {}
    for name, bound in ATTENTION.items():
        found[name] = _evaluate(bound.rounding, names) + _evaluate(bound.underflow, names)
        if name == "dot":
            names["Δg"] = found[name]
    return {name: value[..., 0] if name in ("in_box", "rac", "mrc") else value for name, value in found.items()}


def attention_names(problem: Problem, truth: Solution, backend: str, *, flushed: bool = False) -> dict[str, Any]:
    """Of layers that share one storage type, with a teacher."""
    storage = problem.key[0].dtype
    arithmetic = torch.float64 if storage == torch.float64 else torch.float32
    query, key, scores, size = _scores(problem.query, problem.key, problem.scale, problem.padding)
    teacher = problem.teacher
    assert teacher is not None
    _, _, teacher_scores, teacher_size = _scores(teacher.query, teacher.key, teacher.scale, problem.padding)
    log_p, t = scores.log_softmax(-1), teacher_scores.softmax(-1)
    p, m = log_p.exp(), problem.weights().clamp(0, 1)
    if problem.padding is not None:
        m = m.masked_fill(problem.padding, 0)
    log_share = log_p + m.log()
    p_in, p_out = log_share.softmax(-1), p * (1 - m)
    inside = scores.masked_fill(m == 0, -torch.inf)
    g_in, g_rac, g_mrc = (g.double()[..., None] for g in problem.incoming)
    tokens, width = key.shape[-2:]
    return {
        "u": roundoff(arithmetic),
        # A tensor, because PyTorch divides a number by a tensor through 1 / tensor, which overflows.
        "ω": torch.tensor(smallest(arithmetic, flushed), dtype=torch.float64),
        "u_k": roundoff(storage),
        "ω_k": max(smallest(storage, False), smallest(arithmetic, flushed)),
        "n": PARTIAL_SUM[backend](width),
        "N": tokens,
        "scale": torch.tensor(problem.scale, dtype=torch.float64).abs()[:, None, None],
        "σ": size,
        "σ_t": teacher_size,
        "Σ_in": (m * (inside - inside.amax(-1, keepdim=True)).exp()).sum(-1, keepdim=True),
        "A_in": log_share.logsumexp(-1, keepdim=True).exp(),
        "A_out": p_out.sum(-1, keepdim=True),
        "RAC": truth.terms.rac[..., None],
        "MRC": truth.terms.mrc[..., None],
        "p": p,
        "t": t,
        "p_in": p_in,
        "p_out": p_out,
        "g_in": g_in,
        "g_rac": g_rac,
        "g_mrc": g_mrc,
        "q": query,
        "dq": torch.stack(truth.grad_query),
        "dK": torch.stack(truth.grad_key),
        "K_in": (p_in[..., None, :] @ key.abs())[..., 0, :],
        "K_out": (p_out[..., None, :] @ key.abs())[..., 0, :],
        "K_t": (t[..., None, :] @ key.abs())[..., 0, :],
        "K_max": key.abs().amax((-2, -1))[..., None],
    }


def _scores(
    query: list[Tensor], key: list[Tensor], scale: Any, padding: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (L, B, D), k (L, B, N, D) with 0 at padding, s (L, B, N), the largest scale * sum_d |q_d k_jd| (L, B, 1)."""
    q, k = torch.stack(list(query)).double(), torch.stack(list(key)).double()
    if padding is not None:
        k = k.masked_fill(padding[..., None], 0)
    factor = torch.tensor(scale, dtype=torch.float64)[:, None, None]
    scores = factor * (k @ q[..., None])[..., 0]
    size = factor.abs() * (k.abs() @ q.abs()[..., None])[..., 0].amax(-1, keepdim=True)
    return q, k, scores if padding is None else scores.masked_fill(padding, -torch.inf), size


def loss_bounds(
    problem: LossProblem, config: AttBalanceConfig, truth: LossSolution, *, flushed: bool = False
) -> dict[str, Tensor]:
    """By quantity, in its own shape or one that expands to it."""
    names = loss_names(problem, config, truth, flushed=flushed)
    for name, expression in LOSS_DEFINITIONS.items():
        names[name] = _evaluate(expression, names)
    names["G_last"] = names["G"][-1]
    # Gradients by boxes have four coordinates.
    boxes = {name: value[..., None] if getattr(value, "ndim", 0) else value for name, value in names.items()}
    found = {}
    for name, bound in LOSS.items():
        known = boxes if name == "grad_pred" else names
        found[name] = torch.as_tensor(_evaluate(bound.rounding, known) + _evaluate(bound.underflow, known))
    return found


def loss_names(
    problem: LossProblem, config: AttBalanceConfig, truth: LossSolution, *, flushed: bool = False
) -> dict[str, Any]:
    """(B,), or (S, B) for what each box head has one of, (L, 1) for r."""
    output, pred = truth.output, problem.pred.double()
    pred, target = pred if pred.dim() == 3 else pred[None], problem.target.double()
    layers = problem.rac.shape[0]
    r = (output.rho.abs() + output.rho.mean().abs() + 1)[:, None]
    difficulty = output.attention
    if config.difficulty_from == "mean":
        difficulty = difficulty / layers
    elif config.difficulty_from == "last":
        weight = output.rho[-1] - output.rho.mean() + 1
        difficulty = config.weight_rac * weight * problem.rac[-1] + config.weight_mrc * problem.mrc[-1]
    low = torch.minimum(pred[..., :2] - pred[..., 2:] / 2, target[:, :2] - target[:, 2:] / 2)
    high = torch.maximum(pred[..., :2] + pred[..., 2:] / 2, target[:, :2] + target[:, 2:] / 2)
    hull, reach = high - low, torch.maximum(low.abs(), high.abs())
    shared = torch.minimum(pred[..., :2] + pred[..., 2:] / 2, target[:, :2] + target[:, 2:] / 2) - torch.maximum(
        pred[..., :2] - pred[..., 2:] / 2, target[:, :2] - target[:, 2:] / 2
    )
    ratio = target[:, 2:].prod(-1) if problem.box_ratio is None else problem.box_ratio.double()
    return {
        "u": roundoff(problem.rac.dtype),
        "ω": smallest(problem.rac.dtype, flushed),
        "L": layers,
        "B": problem.rac.shape[1],
        "S": pred.shape[0],
        "r": r,
        "R": (r * problem.rac.double().abs()).sum(0),
        "M": problem.mrc.double().abs().sum(0),
        "w_rac": config.weight_rac,
        "w_mrc": config.weight_mrc,
        "alpha_ar": config.alpha_ar,
        "alpha_l1": config.alpha_l1,
        "alpha_giou": config.alpha_giou,
        "y": difficulty.double().sigmoid(),
        "box_ratio": ratio,
        "l1": output.l1,
        "box": output.box,
        "adw": output.adw,
        "odw": output.odw,
        "union": pred[..., 2:].prod(-1) + target[:, 2:].prod(-1) - shared.clamp(min=0).prod(-1),
        "M_x": reach[..., 0],
        "M_y": reach[..., 1],
        "H_x": hull[..., 0],
        "H_y": hull[..., 1],
    }


def _evaluate(expression: str, names: Mapping[str, Any]) -> Any:
    """Our own constants, over a few functions and nothing else."""
    return eval(expression, {"__builtins__": {}}, {**_FUNCTIONS, **names})


def _sum(values: Tensor) -> Tensor:
    """Over the tokens of a row; over the box heads of a sample."""
    return values.sum(-1, keepdim=True) if values.dim() == 3 else values.sum(0)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "mean": torch.mean,
    "min": lambda limit, values: values.clamp(max=limit),
    "outer": lambda tokens, channels: tokens[..., None] * channels[..., None, :],
    "sum": _sum,
}
