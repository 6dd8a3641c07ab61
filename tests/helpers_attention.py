"""Problems for `attention_terms`, and their solution written out from the paper's equations in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from helpers import excess
from torch import Tensor

from attbalance_ext import AttentionTerms, BoxRegion, QueryAttention, attention_terms
from attbalance_ext.attention import with_offset

GRIDS = {
    1: ((1, 1),),
    31: ((1, 31),),
    400: ((20, 20),),
    401: ((1, 1), (20, 20)),
    500: ((20, 20), (10, 10)),
    1369: ((37, 37),),
}

Dtypes = tuple[Sequence[torch.dtype], Sequence[torch.dtype], torch.dtype]  # query by layer, key by layer, teacher

RESULTS = ("in_box", "rac", "mrc", "query", "key")
LAYOUTS = ("batch_first", "sequence_first", "slice", "sequence_first_slice", "wide_rows", "strided_channels")


def arrange(values: Tensor, layout: str) -> Tensor:
    """The same (B, N, D) values in another storage; what surrounds them is NaN, so that reading it shows."""
    batch, tokens, width = values.shape
    if layout == "batch_first":
        out = values.new_full((batch, tokens, width), torch.nan)
    elif layout == "sequence_first":
        out = values.new_full((tokens, batch, width), torch.nan).transpose(0, 1)
    elif layout == "slice":
        out = values.new_full((batch, tokens + 26, width), torch.nan)[:, 21 : 21 + tokens]
    elif layout == "sequence_first_slice":
        out = values.new_full((tokens + 26, batch, width), torch.nan)[21 : 21 + tokens].transpose(0, 1)
    elif layout == "wide_rows":
        out = values.new_full((batch, tokens, width + 3), torch.nan)[..., 1 : 1 + width]
    elif layout == "strided_channels":
        out = values.new_full((batch, width, tokens), torch.nan).transpose(1, 2)
    else:
        raise ValueError(layout)
    return out.copy_(values)


@dataclass
class Problem:
    """One call of the op with the gradients that come in for (in_box, rac, mrc), each (L, B)."""

    query: list[Tensor]
    key: list[Tensor]
    scale: list[float]
    region: BoxRegion | Tensor
    padding: Tensor | None
    teacher: QueryAttention | None
    incoming: tuple[Tensor, Tensor, Tensor]

    def student(self, query: Sequence[Tensor] | None = None, key: Sequence[Tensor] | None = None) -> QueryAttention:
        return QueryAttention(query or self.query, key or self.key, self.scale, self.padding)

    def weights(self) -> Tensor:
        """Region weights (B, N) in float64."""
        weights = self.region.mask() if isinstance(self.region, BoxRegion) else self.region
        return weights.double()

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem with query, key and teacher in another dtype."""
        teacher = self.teacher and QueryAttention(
            [q.to(dtype) for q in self.teacher.query], [k.to(dtype) for k in self.teacher.key], self.teacher.scale
        )
        return replace(
            self, query=[q.to(dtype) for q in self.query], key=[k.to(dtype) for k in self.key], teacher=teacher
        )


@dataclass
class Solution:
    """Terms (L, B), and gradients: L of (B, D) and L of (B, N, D)."""

    terms: AttentionTerms
    grad_query: list[Tensor]
    grad_key: list[Tensor]

    def tensors(self) -> list[Tensor]:
        return [*self.terms, *self.grad_query, *self.grad_key]


@dataclass
class Truth(Solution):
    """`natural`: by the name of the result, the size it would have without cancellation in the stable form of the
    equations. `noise`: what the truth itself may be wrong by. (L, B) each. `grad_dot`: gradients by q . k, (L, B, N),
    where they were worked out."""

    natural: dict[str, Tensor]
    noise: dict[str, Tensor]
    grad_dot: Tensor | None = None


def make_problem(
    *,
    layers: int = 2,
    batch: int = 3,
    tokens: int = 31,
    width: int = 16,
    query_dtype: Sequence[torch.dtype] = (torch.float32,),
    key_dtype: Sequence[torch.dtype] = (torch.float32,),
    teacher_dtype: torch.dtype | None = torch.float32,
    layout: str = "batch_first",
    region: str = "touch",
    padded: bool = False,
    spread: float = 1.0,
    teacher_distance: float = 1.0,
    seed: int = 0,
) -> Problem:
    """A random problem.

    query_dtype, key_dtype: cycled over the layers. teacher_dtype: None for no teacher.
    region: a rule of `BoxRegion`, or "weights" or "bool" for a (B, N) tensor. padded: each sample ignores some tokens
    (which hold NaN), though never all. spread: standard deviation of the scores. teacher_distance: how far the
    teacher's keys are from the student's.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    padding = None
    if padded:
        padding = uniform(batch, tokens) < 0.3
        padding[:, tokens // 2] = False
    query, key, teacher_query, teacher_key = [], [], [], []
    for layer in range(layers):
        q, k = normal(batch, width), normal(batch, tokens, width)
        q_type, k_type = query_dtype[layer % len(query_dtype)], key_dtype[layer % len(key_dtype)]
        if padding is not None:
            k[padding] = torch.nan
        query.append(q.to(q_type))
        key.append(arrange(k.to(k_type), layout))
        if teacher_dtype is not None:
            teacher_query.append((q + 0.1 * teacher_distance * normal(batch, width)).to(teacher_dtype))
            near = k + teacher_distance * normal(batch, tokens, width)
            teacher_key.append(arrange(near.to(teacher_dtype), layout))
    scale = [spread / math.sqrt(width) * (1 + 0.1 * layer) for layer in range(layers)]
    weights: BoxRegion | Tensor
    if region == "weights":
        weights = uniform(batch, tokens).float()
    elif region == "bool":
        weights = uniform(batch, tokens) < 0.4
    else:
        center, size = 0.3 + 0.4 * uniform(batch, 2), 0.1 + 0.4 * uniform(batch, 2)
        boxes = torch.cat([center, size], dim=1).float()
        weights = BoxRegion(boxes, GRIDS.get(tokens, ((1, tokens),)), region)
    wide = torch.float64 in (*query_dtype[:layers], *key_dtype[:layers])
    # As a GradScaler does it: otherwise float16 gradients fall among the subnormal numbers.
    amplify = 1024 if torch.float16 in (*query_dtype, *key_dtype) else 1
    incoming = tuple((amplify * normal(layers, batch)).to(torch.float64 if wide else torch.float32) for _ in range(3))
    teacher = None
    if teacher_dtype is not None:
        teacher = QueryAttention(teacher_query, teacher_key, [1.1 * s for s in scale])
    return Problem(query, key, scale, weights, padding, teacher, incoming)


def problem_of(case: Mapping[str, Any], dtypes: Dtypes) -> Problem:
    """The problem of a covering set's case, whose "distance" is the teacher's, None for no teacher."""
    query, key, teacher = dtypes
    same = ("layers", "batch", "tokens", "width", "layout", "region", "padded", "spread")
    return make_problem(
        query_dtype=query,
        key_dtype=key,
        teacher_dtype=None if case["distance"] is None else teacher,
        teacher_distance=case["distance"] or 0,
        **{name: case[name] for name in same},
    )


def solve(problem: Problem, backend: str) -> Solution:
    """The op's terms and its gradients for the problem's incoming gradients."""
    query = [q.detach().requires_grad_() for q in problem.query]
    key = [k.detach().requires_grad_() for k in problem.key]
    terms = attention_terms(problem.student(query, key), problem.region, teacher=problem.teacher, backend=backend)
    loss = sum((g * term).sum() for g, term in zip(problem.incoming, terms[:3], strict=True))
    gradients = torch.autograd.grad(loss, [*query, *key])
    terms = AttentionTerms(*(term.detach() for term in terms))
    return Solution(terms, list(gradients[: len(query)]), list(gradients[len(query) :]))


def offset_gradients(
    problem: Problem, backend: str, taken: list[bool]
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor]]:
    """Gradients of the offsets of the layers in ``taken``, of all keys, of all queries."""
    query = [q.detach().requires_grad_() for q in problem.query]
    key = [k.detach().requires_grad_() for k in problem.key]
    dtype = torch.float64 if query[0].dtype == torch.float64 else torch.float32
    offset = [
        torch.zeros(k.shape[:2], dtype=dtype, device=k.device, requires_grad=True) if yes else None
        for k, yes in zip(key, taken, strict=True)
    ]
    student = with_offset(QueryAttention(query, key, problem.scale, problem.padding), offset)
    terms = attention_terms(student, problem.region, teacher=problem.teacher, backend=backend)
    loss = sum((g * term).sum() for g, term in zip(problem.incoming, terms[:3], strict=True))
    leaves = [o for o in offset if o is not None]
    found = torch.autograd.grad(loss, [*leaves, *key, *query], allow_unused=True)
    by_offset = iter(found[: len(leaves)])
    rest = found[len(leaves) :]
    return [next(by_offset) if yes else None for yes in taken], list(rest[: len(key)]), list(rest[len(key) :])


def multiplied_out(factor: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The key's gradient from the gradient by ``query . key``."""
    return (factor[..., None] * query[:, None].to(factor.dtype)).to(key.dtype)


def literal(problem: Problem) -> Truth:
    """The equations, one layer and one sample at a time, with a naive softmax and autograd in float64."""
    layers, batch = len(problem.key), problem.key[0].shape[0]
    weights = problem.weights()
    values = torch.zeros(3, layers, batch, dtype=torch.float64)
    natural, noise = ({name: torch.zeros(layers, batch, dtype=torch.float64) for name in RESULTS} for _ in range(2))
    grad_query = [torch.zeros_like(q, dtype=torch.float64) for q in problem.query]
    grad_key = [torch.zeros(k.shape, dtype=torch.float64) for k in problem.key]
    valid = torch.zeros(batch, dtype=torch.bool)
    for b in range(batch):
        tokens = weights.shape[1]
        keep = torch.ones(tokens, dtype=torch.bool) if problem.padding is None else ~problem.padding[b]
        m = weights[b, keep].clamp(0, 1)
        valid[b] = bool((m > 0).any())
        if not keep.any():
            continue
        for layer in range(layers):
            q = problem.query[layer][b].detach().double().requires_grad_()
            k = problem.key[layer][b, keep].detach().double().requires_grad_()
            g_in, g_rac, g_mrc = (g[layer, b].double() for g in problem.incoming)
            p = naive_softmax(problem.scale[layer] * (k @ q))
            zero = (q * 0).sum() + (k * 0).sum()
            a_in = (p * m).sum() if valid[b] else zero
            a_out = (p * (1 - m)).sum()
            rac = -2 * torch.log(a_in) if valid[b] else zero  # -log A_in - log(1 - A_out), as A_out = 1 - A_in
            mrc, t = zero, torch.zeros_like(p)
            if problem.teacher is not None:
                teacher = problem.teacher
                t = naive_softmax(
                    teacher.scale[layer] * (teacher.key[layer][b, keep].double() @ teacher.query[layer][b].double())
                )
                mrc = (t * (torch.log(t) - torch.log(p))).sum()
            values[:, layer, b] = torch.stack([a_in, rac, mrc]).detach()
            grad_q, grad_k = torch.autograd.grad(g_in * a_in + g_rac * rac + g_mrc * mrc, [q, k])
            grad_query[layer][b] = grad_q
            grad_key[layer][b, keep] = grad_k

            with torch.no_grad():
                a, p_in = torch.zeros_like(a_in), torch.zeros_like(p)
                if valid[b]:
                    a, p_in = (2 * g_rac - g_in * a_in).abs(), p * m / a_in
                g, distance = torch.zeros_like(a), torch.zeros_like(p)
                if problem.teacher is not None:
                    g, distance = g_mrc.abs(), (torch.log(t) - torch.log(p)).abs()
                p_out, scale, size_k = p * (1 - m), abs(problem.scale[layer]), k.norm(dim=1)
                mean_in, mean_out, mean_t = ((w @ k).norm() for w in (p_in, p_out, t))
                for name, stable, naive in (
                    ("in_box", a_in, a_in),
                    ("rac", rac, rac + 1),
                    # log p is never known better than to rounding, which KL has the square of.
                    ("mrc", (t * distance).sum() + 1e-6, (t * (torch.log(t).abs() + torch.log(p).abs())).sum()),
                    (
                        "query",
                        scale * (a * (mean_out + a_out * mean_in) + g * (mean_out + a_in * mean_in + mean_t)),
                        scale * (a * ((p + p_in) @ size_k) + g * ((p + t) @ size_k)),
                    ),
                    (
                        "key",
                        scale * (a * (p_out + a_out * p_in) + g * (p + t)).norm() * q.norm(),
                        scale * (a * (p + p_in) + g * (p + t)).norm() * q.norm(),
                    ),
                ):
                    natural[name][layer, b] = stable
                    noise[name][layer, b] = 1e-14 * naive
    return Truth(AttentionTerms(*values, valid), grad_query, grad_key, natural, noise)


def naive_softmax(scores: Tensor) -> Tensor:
    """Without subtracting the largest: the scores of the tests stay below 50."""
    return scores.exp() / scores.exp().sum()


def worst_excess(solution: Solution, truth: Truth) -> dict[str, float]:
    """For each result, its largest error over what is allowed: terms one by one, gradients by (layer, sample)."""
    assert torch.equal(solution.terms.valid, truth.terms.valid)
    natural, noise = truth.natural, truth.noise
    found = {
        name: excess(getattr(solution.terms, name), getattr(truth.terms, name), natural[name], noise[name])
        for name in ("in_box", "rac", "mrc")
    }
    for name, dims in (("query", (1,)), ("key", (1, 2))):
        gradients = zip(getattr(solution, f"grad_{name}"), getattr(truth, f"grad_{name}"), strict=True)
        for layer, (actual, expected) in enumerate(gradients):
            sizes = natural[name][layer], noise[name][layer]
            found[f"grad_{name}[{layer}]"] = excess(actual, expected, *sizes, dims)
    return found


def assert_solves(solution: Solution, truth: Truth) -> None:
    wrong = {name: ratio for name, ratio in worst_excess(solution, truth).items() if not ratio <= 1}
    assert not wrong, f"errors as multiples of what is allowed: {wrong}"


def tensor_errors(solution: Solution, truth: Truth) -> dict[str, float]:
    """For each result as one tensor: norm(error) / norm(truth), not counting 1e-6 of its natural size."""
    natural, noise = truth.natural, truth.noise
    found = {
        name: _relative(getattr(solution.terms, name), getattr(truth.terms, name), natural[name], noise[name])
        for name in ("in_box", "rac", "mrc")
    }
    for name in ("query", "key"):
        gradients = zip(getattr(solution, f"grad_{name}"), getattr(truth, f"grad_{name}"), strict=True)
        for layer, (actual, expected) in enumerate(gradients):
            found[f"grad_{name}[{layer}]"] = _relative(actual, expected, natural[name][layer], noise[name][layer])
    return found


def _relative(actual: Tensor, truth: Tensor, natural: Tensor, noise: Tensor) -> float:
    kind = torch.finfo(actual.dtype)
    underflow = kind.tiny * kind.eps * truth.numel() ** 0.5  # float16 gradients get below its normal numbers
    error = (actual.double() - truth).norm() - (1e-6 * natural + noise).nan_to_num().norm() - underflow
    return 0.0 if error <= 0 else (error / truth.norm()).item()
