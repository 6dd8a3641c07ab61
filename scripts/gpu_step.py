"""Both ops once, forward and backward, on a CUDA device: small enough for a sanitizer, real enough for a profiler.

    python -m scripts.gpu_step [--steps N] [--batch B] [--first]

Covers every kernel: `_rows` in three dtypes, with and without a teacher, for narrow and wide rows; `_any` for keys at
an odd address and for a number of columns that is no multiple of 16 bytes; by the batch, rows that several blocks share
and rows that one block has for itself.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor

from attbalance_ext import AttBalanceLoss, BoxRegion, QueryAttention, attention_terms

LAYERS, TOKENS, GRID = 4, 400, (20, 20)


class Problem(NamedTuple):
    dtype: torch.dtype
    width: int = 256
    teacher: bool = True
    offset: int = 0  # of the keys from an aligned address, in elements


PROBLEMS = (
    Problem(torch.bfloat16),
    Problem(torch.float32),
    Problem(torch.float16, teacher=False),
    Problem(torch.bfloat16, width=768),
    Problem(torch.bfloat16, offset=1),
    Problem(torch.float32, width=250),
)


def step(batch: int, problem: Problem) -> Tensor:
    """The loss of random inputs, backward run."""
    width = problem.width

    def keys() -> list[Tensor]:
        size = batch * TOKENS * width
        flat = [torch.randn(size + problem.offset, device="cuda").to(problem.dtype) for _ in range(LAYERS)]
        return [f[problem.offset :].view(batch, TOKENS, width) for f in flat]

    def queries() -> list[Tensor]:
        return [torch.randn(batch, width, device="cuda") for _ in range(LAYERS)]

    boxes = torch.tensor([0.5, 0.5, 0.4, 0.4], device="cuda") + 0.1 * torch.rand(batch, 4, device="cuda")
    padding = torch.rand(batch, TOKENS, device="cuda") < 0.1
    query, key = ([t.requires_grad_() for t in tensors] for tensors in (queries(), keys()))
    predicted = (boxes + 0.02).requires_grad_()
    student = QueryAttention(query, key, 0.02, padding)
    teacher = QueryAttention(queries(), keys(), 0.02) if problem.teacher else None
    terms = attention_terms(student, BoxRegion(boxes, GRID), teacher=teacher, backend="cuda")
    loss = AttBalanceLoss(backend="cuda")(terms, predicted, boxes).loss
    loss.backward()
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--first", action="store_true", help="the first problem alone")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for _ in range(arguments.steps):
        for problem in PROBLEMS[:1] if arguments.first else PROBLEMS:
            loss = step(arguments.batch, problem)
            print(f"B={arguments.batch} {problem}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
