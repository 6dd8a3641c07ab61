"""The equations of `attention_terms` in 60-digit decimals: the truth where float64 would lose it to cancellation."""

from __future__ import annotations

import decimal
from decimal import Decimal

import torch
from helpers_attention import RESULTS, Problem, Truth
from torch import Tensor

from attbalance_ext import AttentionTerms, QueryAttention


def extreme_problem(
    in_box: list[float],
    teacher_distance: float,
    dtype: torch.dtype,
    *,
    tokens: int = 12,
    width: int = 8,
    layers: int = 1,
) -> Problem:
    """One sample for each wanted A_in (met approximately), a third of its tokens inside.

    The scores inside and outside are log(A_in / A_out) apart. Fractional weights sit on the side with little mass.
    teacher_distance: standard deviation of the teacher's scores around the student's; infinite: the two swap sides.
    """
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch, inside = len(in_box), tokens // 3
    wanted = torch.tensor(in_box, dtype=torch.float64)[:, None]
    gap = (wanted / (1 - wanted)).log()
    is_inside = torch.arange(tokens) < inside
    weights = is_inside.double().repeat(batch, 1)
    weights[:, inside - 1 : inside + 1] = torch.where(wanted < 0.5, torch.tensor([0.5, 0]), torch.tensor([1, 0.5]))
    scale = 0.11
    query, key, teacher_query, teacher_key = [], [], [], []
    for _ in range(layers):
        q = normal(batch, width)
        scores = 0.3 * normal(batch, tokens) + torch.where(is_inside, gap, -gap) / 2
        scores[:, inside:] -= torch.tensor(2.0).log()  # twice as many tokens
        target = torch.where(is_inside, -gap, gap) / 2 if teacher_distance == float("inf") else scores
        if teacher_distance != float("inf"):
            target = target + teacher_distance * normal(batch, tokens)
        along = q / (scale * q.square().sum(-1, keepdim=True))
        across = normal(batch, tokens, width)
        across -= (across @ q[..., None]) * q[:, None] / q.square().sum(-1)[:, None, None]
        query.append(q.to(dtype))
        key.append((scores[..., None] * along[:, None] + across).to(dtype))
        teacher_query.append(q.to(dtype))
        teacher_key.append((target[..., None] * along[:, None] + across).to(dtype))
    terms = torch.float64 if dtype == torch.float64 else torch.float32
    amplify = 1024 if dtype == torch.float16 else 1
    incoming = tuple((amplify * normal(layers, batch)).to(terms) for _ in range(3))
    teacher = QueryAttention(teacher_query, teacher_key, scale)
    return Problem(query, key, [scale] * layers, weights.to(terms), None, teacher, incoming)


def exact(problem: Problem) -> Truth:
    """The solution of a small problem, from its very bits, by the naive equations."""
    with decimal.localcontext(decimal.Context(prec=60, Emin=-(10**6), Emax=10**6)):
        return _exact(problem)


def _exact(problem: Problem) -> Truth:
    layers, (batch, tokens, width) = len(problem.key), problem.key[0].shape
    values = torch.zeros(3, layers, batch, dtype=torch.float64)
    natural = {name: torch.zeros(layers, batch, dtype=torch.float64) for name in RESULTS}
    noise = {name: torch.zeros(layers, batch, dtype=torch.float64) for name in RESULTS}
    grad_query = [torch.zeros(batch, width, dtype=torch.float64) for _ in range(layers)]
    grad_key = [torch.zeros(batch, tokens, width, dtype=torch.float64) for _ in range(layers)]
    grad_dot = torch.zeros(layers, batch, tokens, dtype=torch.float64)
    weights, teacher = problem.weights(), problem.teacher
    assert teacher is not None
    for layer in range(layers):
        for b in range(batch):
            keep = slice(None) if problem.padding is None else ~problem.padding[b]
            q, scale = _vector(problem.query[layer][b]), Decimal(problem.scale[layer])
            k = _rows(problem.key[layer][b, keep])
            m = _vector(weights[b, keep])
            p = _softmax(q, k, scale)
            teacher_q, teacher_scale = _vector(teacher.query[layer][b]), Decimal(teacher.scale[layer])
            t = _softmax(teacher_q, _rows(teacher.key[layer][b, keep]), teacher_scale)
            g_in, g_rac, g_mrc = (Decimal(g[layer, b].item()) for g in problem.incoming)
            outside = [1 - mj for mj in m]
            a_in, a_out = _dot(p, m), _dot(p, outside)
            log_in = a_in.ln() if a_out > Decimal("1e-20") else -a_out - a_out**2 / 2 - a_out**3 / 3
            distance = [ti.ln() - pi.ln() for ti, pi in zip(t, p, strict=True)]
            values[:, layer, b] = _tensor([a_in, -2 * log_in, _dot(t, distance)])
            # p_j (m_j - A_in), also where A_out is less than 60 digits of 1.
            d_in = [pj * (mj * a_out - rest * a_in) for pj, mj, rest in zip(p, m, outside, strict=True)]
            d_mrc = [pj - tj for pj, tj in zip(p, t, strict=True)]
            d_s = [(g_in - 2 * g_rac / a_in) * x + g_mrc * y for x, y in zip(d_in, d_mrc, strict=True)]
            grad_dot[layer, b, keep] = _tensor([scale * x for x in d_s])
            grad_key[layer][b, keep] = torch.stack([_tensor([scale * x * y for y in q]) for x in d_s])
            grad_query[layer][b] = _tensor([scale * _dot(d_s, column) for column in zip(*k, strict=True)])

            a, g = abs(2 * g_rac - g_in * a_in), abs(g_mrc)
            p_in = [pj * mj / a_in for pj, mj in zip(p, m, strict=True)]
            p_out = [pj * rest for pj, rest in zip(p, outside, strict=True)]
            mean_in, mean_out, mean_t = (
                _norm([_dot(w, column) for column in zip(*k, strict=True)]) for w in (p_in, p_out, t)
            )
            of_scores = [a * (x + a_out * y) + g * (pj + tj) for x, y, pj, tj in zip(p_out, p_in, p, t, strict=True)]
            for name, size in (
                ("in_box", a_in),
                ("rac", -2 * log_in),
                ("mrc", _dot(t, [abs(x) for x in distance]) + Decimal("1e-6")),
                ("query", scale * (a * (mean_out + a_out * mean_in) + g * (mean_out + a_in * mean_in + mean_t))),
                ("key", scale * _norm(of_scores) * _norm(q)),
            ):
                natural[name][layer, b] = float(size)
    valid = torch.ones(batch, dtype=torch.bool)
    return Truth(AttentionTerms(*values, valid), grad_query, grad_key, natural, noise, grad_dot)


def _vector(values: Tensor) -> list[Decimal]:
    return [Decimal(value) for value in values.double().tolist()]


def _tensor(values: list[Decimal]) -> Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def _rows(values: Tensor) -> list[list[Decimal]]:
    return [_vector(row) for row in values]


def _dot(a: list[Decimal], b: tuple[Decimal, ...] | list[Decimal]) -> Decimal:
    return sum((x * y for x, y in zip(a, b, strict=True)), Decimal(0))


def _norm(values: list[Decimal]) -> Decimal:
    return _dot(values, values).sqrt()


def _softmax(q: list[Decimal], k: list[list[Decimal]], scale: Decimal) -> list[Decimal]:
    powers = [(scale * _dot(q, row)).exp() for row in k]
    total = sum(powers)
    return [power / total for power in powers]
