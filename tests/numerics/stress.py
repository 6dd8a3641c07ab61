"""Named problems for both ops where floating-point numbers go bad, in any storage type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from helpers_attention import Problem, make_problem
from helpers_exact import extreme_problem
from helpers_loss import LossProblem, make_loss_problem
from torch import Tensor

from attbalance_ext import AttBalanceConfig, QueryAttention

IN_BOX = [1e-30, 1e-12, 1e-4, 0.3, 0.5, 0.9, 1 - 1e-4, 1 - 1e-8]
TOKENS = 12
INSIDE = torch.arange(TOKENS) < TOKENS // 3


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator(), dtype=torch.float64)


def _of_scores(
    scores: Tensor, teacher: Tensor, dtype: torch.dtype, weights: Tensor = INSIDE, incoming: float = 1.0
) -> Problem:
    """One layer whose student and teacher have these scores (B, N), as far as the dtype can say them."""
    batch, tokens = scores.shape
    width, scale = 8, 0.5
    q = _normal(batch, width)
    across = _normal(batch, tokens, width)
    across -= (across @ q[..., None]) * q[:, None] / q.square().sum(-1)[:, None, None]
    along = q / (scale * q.square().sum(-1, keepdim=True))

    def key(wanted: Tensor) -> Tensor:
        return (wanted.double()[..., None] * along[:, None] + across).to(dtype)

    terms = _terms_dtype(dtype)
    return Problem(
        [q.to(dtype)],
        [key(scores)],
        [scale],
        weights.to(terms).expand(batch, tokens).contiguous(),
        None,
        QueryAttention([q.to(dtype)], [key(teacher)], scale),
        tuple((incoming * g).to(terms) for g in _normal(3, 1, batch)),
    )


def _terms_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _both_sides(gap: list[float], dtype: torch.dtype) -> Problem:
    """Scores inside the box this far above those outside, one sample each; the teacher has half of it."""
    scores = torch.tensor(gap, dtype=torch.float64)[:, None] * torch.where(INSIDE, 0.5, -0.5)
    scores = scores + 0.3 * _normal(len(gap), TOKENS)
    return _of_scores(scores, scores / 2, dtype)


def logits_of_1e4(dtype: torch.dtype) -> Problem:
    signs = _normal(2, 6, TOKENS).sign() * 1e4 + _normal(2, 6, TOKENS)
    return _of_scores(signs[0], signs[1], dtype)


def one_token_holds_all_mass(dtype: torch.dtype) -> Problem:
    scores, teacher = torch.full((3, TOKENS), -150.0), torch.full((3, TOKENS), -50.0)
    for sample, winner in enumerate((0, 5, 11)):
        scores[sample, winner] = 150
        teacher[sample, 3] = 50
    return _of_scores(scores, teacher, dtype)


def equal_logits(dtype: torch.dtype) -> Problem:
    """Every token the same key: p = 1 / N. In the second half the query is 0 and the keys differ."""
    problem = _of_scores(torch.full((4, TOKENS), 3.0), torch.zeros(4, TOKENS), dtype, torch.linspace(0, 1, TOKENS))
    problem.key[0][:2] = problem.key[0][:2, :1].clone()
    problem.query[0][2:] = 0
    return problem


def largest_keys(dtype: torch.dtype) -> Problem:
    """Where arithmetic in the storage type would overflow: keys next to its largest number, a query of its inverse."""
    problem = _of_scores(2 * _normal(3, TOKENS), _normal(3, TOKENS), dtype, incoming=1e-2)
    largest = torch.finfo(dtype).max / 8
    for attention in (problem.student(), problem.teacher):
        key = attention.key[0].double()
        factor = (largest / 2) / key.abs().amax()
        attention.key[0].copy_((key * factor).to(dtype))
        attention.query[0].copy_((attention.query[0].double() / factor * 4).to(dtype))
    return replace(problem, scale=[0.125], teacher=replace(problem.teacher, scale=0.125))


def subnormal_keys(dtype: torch.dtype) -> Problem:
    """Keys around the storage type's smallest normal number, most of them below."""
    smallest = torch.finfo(dtype).tiny
    problem = _of_scores(_normal(3, TOKENS), _normal(3, TOKENS), dtype, incoming=0.1)
    normal = _normal(4, 3, TOKENS, 8)
    problem.query[0].copy_((problem.query[0].double().clamp(-2, 2) * 0.4 / smallest).to(dtype))
    problem.key[0].copy_((0.7 * smallest * normal[0]).to(dtype))
    problem.teacher.query[0].copy_(problem.query[0])
    problem.teacher.key[0].copy_((0.7 * smallest * normal[1]).to(dtype))
    return replace(problem, scale=[1.0], teacher=replace(problem.teacher, scale=1.0))


def subnormal_weights(dtype: torch.dtype) -> Problem:
    """Region weights around and below the arithmetic's smallest normal number."""
    size = torch.finfo(_terms_dtype(dtype)).tiny * torch.tensor([8, 0.5, 1e-3])[:, None].double()
    weights = torch.where(INSIDE, size, 0.0)
    return _of_scores(_normal(3, TOKENS), _normal(3, TOKENS), dtype, weights)


def subnormal_gradients(dtype: torch.dtype) -> Problem:
    """Gradients around the storage type's smallest normal number."""
    return _of_scores(_normal(3, TOKENS), _normal(3, TOKENS), dtype, incoming=torch.finfo(dtype).tiny)


def _random(tokens: int, width: int, spread: float, padded: bool = False) -> Callable[[torch.dtype], Problem]:
    def make(dtype: torch.dtype) -> Problem:
        return make_problem(
            layers=2,
            batch=2,
            tokens=tokens,
            width=width,
            query_dtype=(dtype,),
            key_dtype=(dtype,),
            teacher_dtype=dtype,
            spread=spread,
            padded=padded,
            region="weights",
        )

    return make


ATTENTION: dict[str, Callable[[torch.dtype], Problem]] = {
    "A_in from 1e-30 to 1 - 1e-8": lambda dtype: extreme_problem(IN_BOX, 1.0, dtype),
    "teacher almost agrees": lambda dtype: extreme_problem(IN_BOX, 1e-6, dtype),
    "teacher agrees": lambda dtype: extreme_problem(IN_BOX, 0.0, dtype),
    "teacher on the other side": lambda dtype: extreme_problem(IN_BOX, float("inf"), dtype),
    "A_in and A_out below any float": lambda dtype: _both_sides([-300, -95, -88, 88, 95, 300], dtype),
    "logits of 1e4": logits_of_1e4,
    "one token holds all mass": one_token_holds_all_mass,
    "equal logits": equal_logits,
    "largest keys": largest_keys,
    "subnormal keys": subnormal_keys,
    "subnormal weights": subnormal_weights,
    "subnormal gradients": subnormal_gradients,
    "random, small scores": _random(31, 32, 0.1),
    "random, padded, odd width": _random(31, 7, 1.0, padded=True),
    "random, large scores": _random(31, 32, 8.0),
}
RANDOM = tuple(name for name in ATTENTION if name.startswith("random"))


def _with_rac(values: list[float]) -> LossProblem:
    """A batch in which RAC and MRC of all layers take these values, one sample each."""
    problem = make_loss_problem(batch=len(values))
    terms = torch.tensor(values).expand_as(problem.rac)
    return replace(problem, rac=terms.clone(), mrc=terms.flip(1).clone())


def _with_boxes(side: float) -> LossProblem:
    """Boxes with sides of this order, whose prediction is off by as much."""
    problem = make_loss_problem(batch=6, stages=2)
    center, size = problem.target[:, :2], problem.target[:, 2:]
    target = torch.cat([center, side * size], dim=1)
    pred = torch.cat([center + side * (problem.pred[..., :2] - center), side * problem.pred[..., 2:]], dim=-1)
    return replace(problem, target=target, pred=pred)


def _with_in_box(size: float) -> LossProblem:
    problem = make_loss_problem(batch=9)
    return replace(problem, in_box=(problem.in_box.double() * size).float())


LOSS: dict[str, tuple[Callable[[], LossProblem], AttBalanceConfig]] = {
    "random": (lambda: make_loss_problem(batch=37, stages=3, with_ratio=True), AttBalanceConfig()),
    "random, ties": (lambda: make_loss_problem(batch=12, ties=True, invalid=True), AttBalanceConfig()),
    "RAC from 1e-38 to 1e4": (lambda: _with_rac([1e-38, 1e-8, 1.0, 20.0, 140.0, 1e4]), AttBalanceConfig()),
    "RAC against MRC": (
        lambda: _with_rac([1e-8, 1.0, 20.0, 20.0, 1.0, 1e-8]),
        AttBalanceConfig(rho="off", weight_mrc=-1.0, difficulty_from="last", alpha_ar=0.0),
    ),
    "A_in of 1e-30": (lambda: _with_in_box(1e-30), AttBalanceConfig(difficulty_from="mean")),
    "A_in below the normal floats": (lambda: _with_in_box(1e-39), AttBalanceConfig()),
    "boxes of 1e-3": (lambda: _with_boxes(1e-3), AttBalanceConfig()),
    "boxes of 1e-5": (lambda: _with_boxes(1e-5), AttBalanceConfig()),
    "boxes of 1e4": (lambda: _with_boxes(1e4), AttBalanceConfig(odw=False)),
}
