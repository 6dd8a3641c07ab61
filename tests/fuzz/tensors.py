"""Seeded tensors in any storage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from helpers_attention import LAYOUTS, arrange
from torch import Tensor

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
KEY_LAYOUTS = (*LAYOUTS, "one_sample", "one_token")
PLAIN_LAYOUTS = ("contiguous", "transposed", "wide", "one_row")


class Source:
    """Random float64 tensors from one seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator, dtype=torch.float64)

    def index(self, size: int) -> int:
        return int(torch.randint(size, (), generator=self._generator))

    def pick(self, rows: Sequence[Sequence[float]], count: int) -> Tensor:
        """(count, ...): rows at random."""
        table = torch.tensor(rows, dtype=torch.float64)
        return table[torch.randint(len(rows), (count,), generator=self._generator)]


def lay_out_key(values: Tensor, layout: str, shift: int) -> Tensor:
    """(B, N, D) in a layout, which may repeat a sample's or a token's values, `shift` elements into its storage."""
    if layout == "one_sample":
        return shifted(values[:1], shift).expand_as(values)
    if layout == "one_token":
        return shifted(values[:, :1], shift).expand_as(values)
    return shifted(arrange(values, layout), shift)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """A matrix in a layout, which may repeat its first row."""
    rows, columns = values.shape
    if layout == "one_row":
        return values[:1].expand_as(values)
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "wide":
        wide = values.new_full((rows, columns + 3), torch.nan if values.is_floating_point() else True)
        return wide[:, 2 : 2 + columns].copy_(values)
    return values.contiguous()


def shifted(values: Tensor, shift: int) -> Tensor:
    """A copy with the same strides, `shift` elements of NaN before it."""
    if not shift or not values.numel():
        return values
    extent = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, values.stride(), strict=True))
    storage = values.new_full((shift + extent,), torch.nan)
    return storage.as_strided(values.shape, values.stride(), shift).copy_(values)
