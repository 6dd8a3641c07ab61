"""Problems on a CUDA device, and their solutions back on the CPU where the truth is."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from helpers_attention import Problem, Solution
from helpers_loss import LossProblem, LossSolution
from torch import Tensor

from attbalance_ext import AttBalanceOutput, AttentionTerms, BoxRegion, QueryAttention

DEVICE = torch.device("cuda", 0)
BACKENDS = ("cuda", "triton")


def move(tensor: Tensor, device: torch.device = DEVICE) -> Tensor:
    """A copy with the same strides and offset, and with what surrounds the values: `Tensor.to` would close the gaps."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def on_device(problem: Problem, device: torch.device = DEVICE) -> Problem:
    def attention(query: list[Tensor], key: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [move(q, device) for q in query], [move(k, device) for k in key]

    region, teacher = problem.region, problem.teacher
    query, key = attention(problem.query, problem.key)
    return replace(
        problem,
        query=query,
        key=key,
        region=replace(region, boxes=region.boxes.to(device)) if isinstance(region, BoxRegion) else region.to(device),
        padding=None if problem.padding is None else problem.padding.to(device),
        teacher=teacher and QueryAttention(*attention(teacher.query, teacher.key), teacher.scale),
        incoming=tuple(gradient.to(device) for gradient in problem.incoming),
    )


def loss_on_device(problem: LossProblem, device: torch.device = DEVICE) -> LossProblem:
    return replace(problem, **{f.name: _to(getattr(problem, f.name), device) for f in fields(problem)})


def at_home(solution: Solution) -> Solution:
    """The solution on the CPU."""
    terms = AttentionTerms(*(term.cpu() for term in solution.terms))
    return Solution(terms, [g.cpu() for g in solution.grad_query], [g.cpu() for g in solution.grad_key])


def loss_at_home(solution: LossSolution) -> LossSolution:
    output = AttBalanceOutput(*(value.cpu() for value in solution.output))
    return LossSolution(output, solution.grad_rac.cpu(), solution.grad_mrc.cpu(), solution.grad_pred.cpu())


def poison(device: torch.device = DEVICE) -> None:
    """Fill what the caching allocator hands out next with NaN, large blocks and small ones."""
    large = [torch.full((16 << 20,), torch.nan, device=device) for _ in range(4)]
    small = [torch.full((1 << bits,), torch.nan, device=device) for bits in range(6, 22) for _ in range(8)]
    del large, small


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
