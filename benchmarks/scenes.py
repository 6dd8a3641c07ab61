"""Synthetic samples: boxes, images smaller than their canvas, sentences shorter than the longest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Grids = tuple[tuple[int, int], ...]

CANVAS = 640  # pixels a side: what the host models pad their images to
# Today's usual rasterisation keeps a cell when its corner pixel is inside the box. All providers are given that rule,
# so that all of them can be held to one truth; the other rules cost the same.
RULE = "nearest"


def grids_of(tokens: int) -> Grids:
    """The grids behind a token count: QRNet's 20 x 20 then 10 x 10 for 500, else the grid nearest to a square."""
    if tokens == 500:
        return ((20, 20), (10, 10))
    rows = next(r for r in range(math.isqrt(tokens), 0, -1) if tokens % r == 0)
    return ((rows, tokens // rows),)


def draw_boxes(batch: int, grids: Grids, generator: torch.Generator, canvas: int = CANVAS) -> Tensor:
    """(B, 4) cxcywh in [0, 1]: corners on odd pixels of the canvas, at least one cell of every grid inside."""

    def interval(cells: int) -> tuple[Tensor, Tensor]:
        if cells == 1:
            return torch.zeros(batch), torch.ones(batch)
        least = min(-(-canvas // cells) + 2, canvas - 4)
        length = torch.randint(least, max(least + 1, canvas // 2), (batch,), generator=generator) // 2 * 2 + 2
        low = (torch.rand(batch, generator=generator) * (canvas - 2 - length)).long() // 2 * 2 + 1
        return low / canvas, (low + length) / canvas

    x0, x1 = interval(min(columns for _, columns in grids))
    y0, y1 = interval(min(rows for rows, _ in grids))
    return torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1).float()


def draw_pixel_padding(boxes: Tensor, generator: torch.Generator, canvas: int = CANVAS) -> Tensor:
    """(B, S, S) bool, True where the canvas shows no image.

    Images lie in the corner of the canvas and fill it one way; the other way they end somewhere after six tenths of it
    and after the box.
    """
    x, y, w, h = (boxes * canvas).unbind(-1)
    batch = len(boxes)
    ends = (torch.rand(batch, generator=generator) * 0.4 + 0.6) * canvas
    wide = torch.arange(batch) % 2 == 0
    width = torch.where(wide, canvas, torch.maximum(ends, x + w / 2))[:, None, None]
    height = torch.where(wide, torch.maximum(ends, y + h / 2), canvas)[:, None, None]
    pixel = torch.arange(canvas)
    return (pixel >= width) | (pixel[:, None] >= height)


def token_padding(pixels: Tensor, grids: Grids) -> Tensor:
    """(B, N) from (B, S, S): a token is padding where its first pixel is, and with it all others."""
    side = pixels.shape[-1]
    return torch.cat(
        [
            pixels[:, torch.arange(rows) * side // rows][:, :, torch.arange(columns) * side // columns].flatten(1)
            for rows, columns in grids
        ],
        dim=1,
    )


def draw_word_padding(batch: int, words: int, generator: torch.Generator) -> Tensor:
    """(B, T) bool: sentences of 3 words and more, the first as long as allowed."""
    lengths = torch.randint(min(3, words), words + 1, (batch, 1), generator=generator)
    lengths[:1] = words
    return torch.arange(words) >= lengths
