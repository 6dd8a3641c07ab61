"""Both ops once, forward and backward, on a CUDA device: small enough for a sanitizer, real enough for a profiler.

    python -m scripts.gpu_step [--steps N] [--batch B]

Covers the kernels for whole rows (aligned, bf16 and fp32), for any layout (odd pointers) and a batch of one, whose
tokens are split over blocks.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from attbalance_ext import AttBalanceLoss, BoxRegion, QueryAttention, attention_terms

LAYERS, TOKENS, WIDTH, GRID = 4, 400, 256, (20, 20)


def step(batch: int, dtype: torch.dtype, offset: int) -> Tensor:
    """The loss of a random problem whose keys start `offset` elements behind an aligned address, backward run."""

    def keys() -> list[Tensor]:
        size = batch * TOKENS * WIDTH
        flat = [torch.randn(size + offset, device="cuda").to(dtype) for _ in range(LAYERS)]
        return [f[offset:].view(batch, TOKENS, WIDTH) for f in flat]

    def queries() -> list[Tensor]:
        return [torch.randn(batch, WIDTH, device="cuda") for _ in range(LAYERS)]

    boxes = torch.tensor([0.5, 0.5, 0.4, 0.4], device="cuda") + 0.1 * torch.rand(batch, 4, device="cuda")
    padding = torch.rand(batch, TOKENS, device="cuda") < 0.1
    query, key = ([t.requires_grad_() for t in tensors] for tensors in (queries(), keys()))
    predicted = (boxes + 0.02).requires_grad_()
    student = QueryAttention(query, key, 0.02, padding)
    teacher = QueryAttention(queries(), keys(), 0.02)
    terms = attention_terms(student, BoxRegion(boxes, GRID), teacher=teacher, backend="cuda")
    loss = AttBalanceLoss(backend="cuda")(terms, predicted, boxes).loss
    loss.backward()
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for _ in range(arguments.steps):
        for batch, dtype, offset in (
            (arguments.batch, torch.bfloat16, 0),
            (arguments.batch, torch.float32, 0),
            (arguments.batch, torch.bfloat16, 1),
            (1, torch.bfloat16, 0),
        ):
            loss = step(batch, dtype, offset)
            print(f"B={batch} {dtype} offset {offset}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
