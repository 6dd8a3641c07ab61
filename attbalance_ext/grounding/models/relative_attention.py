"""Self-attention on a grid with sine relative positions, on PyTorch's fused kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RelativeAttention(nn.Module):
    """Multi-head self-attention whose scores know how far apart two cells are (VLTVG, section 3.3).

    The score of cells i and j in a head is ``q_i . (k_j + r_x[column_j - column_i] + r_y[row_j - row_i]) / sqrt(d)``
    with r linear in the sines and cosines of the offset in cells (published: offsets within 20; here all that the grid
    has).

    No (N, N) bias is made. A query has only W + H different position terms, one for each column and each row of the
    grid, so they are appended to the query; a key is appended the indicators of its own column and row. Their dot
    product picks the two terms, exactly, and the whole is one ``scaled_dot_product_attention`` of width d + W + H.
    """

    columns: Tensor
    rows: Tensor
    indicators: Tensor

    def __init__(self, dim: int, heads: int, grid: tuple[int, int], dropout: float) -> None:
        super().__init__()
        height, width = grid
        self.grid = grid
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.column_projection = nn.Linear(dim // 2, dim, bias=False)
        self.row_projection = nn.Linear(dim // 2, dim, bias=False)
        self.out = nn.Linear(dim, dim)
        cells = torch.arange(height * width)
        column, row = cells % width, cells // width
        self.register_buffer("columns", sine_offsets(width, dim // 2), persistent=False)
        self.register_buffer("rows", sine_offsets(height, dim // 2), persistent=False)
        indicators = torch.cat([F.one_hot(column, width), F.one_hot(row, height)], dim=1)
        self.register_buffer("indicators", indicators.float(), persistent=False)

    def forward(self, x: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
        """x (N, B, D) makes queries and keys, value (N, B, D); padding (B, N) bool, True = ignore -> (N, B, D)."""
        q, k, v = self._split(self.query(x)), self._split(self.key(x)), self._split(self.value(value))
        width = q.shape[-1]
        q = torch.cat([q, *self.position_terms(q)], dim=-1)
        k = torch.cat([k, self.indicators.to(k.dtype).expand(*k.shape[:2], -1, -1)], dim=-1)
        v = F.pad(v, (0, k.shape[-1] - width))  # the fused kernels want one width
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if padding is None else ~padding[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
            scale=width**-0.5,
        )
        return self.out(attended[..., :width].permute(2, 0, 1, 3).flatten(2))

    def position_terms(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, heads, N, d) -> its scores with each column (B, heads, N, W) and each row (B, heads, N, H)."""
        by_cell = q.unflatten(2, self.grid)
        columns = self.column_projection(self.columns).unflatten(2, (self.heads, -1))
        rows = self.row_projection(self.rows).unflatten(2, (self.heads, -1))
        return (
            torch.einsum("bhyxd,xchd->bhyxc", by_cell, columns).flatten(2, 3),
            torch.einsum("bhyxd,yrhd->bhyxr", by_cell, rows).flatten(2, 3),
        )

    def _split(self, x: Tensor) -> Tensor:
        """(N, B, D) -> (B, heads, N, d)."""
        return x.unflatten(2, (self.heads, -1)).permute(1, 2, 0, 3)


def sine_offsets(cells: int, dim: int) -> Tensor:
    """(cells, cells, dim): sines and cosines of ``to - from``, at wavelengths from 2 pi to 10000 * 2 pi cells."""
    place = torch.arange(cells)
    offset = (place[None] - place[:, None])[..., None]
    angle = offset * 10000 ** (-torch.arange(0, dim, 2) / dim)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)
