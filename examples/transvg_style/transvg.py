"""A repository in the style of TransVG, small: what both training scripts beside this file import.

Sequence-first tokens [REG (1), words (20), visual (20 x 20)]; learned positions added to queries and keys; padding
masks for words and pictures; REG's output gives the box.
"""

import torch
from torch import Tensor, nn

WORDS, GRID, PATCH = 20, 20, 4
SIZE = GRID * PATCH


class TransVG(nn.Module):
    def __init__(self, dim: int = 32, layers: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(5, dim, PATCH, stride=PATCH)
        self.words = nn.Embedding(VOCABULARY, dim)
        self.reg = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.positions = nn.Parameter(torch.randn(1 + WORDS + GRID * GRID, 1, dim) * 0.02)
        self.fusion = nn.ModuleList(FusionLayer(dim) for _ in range(layers))
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4))

    def forward(self, pictures: Tensor, picture_padding: Tensor, words: Tensor, word_padding: Tensor) -> Tensor:
        """pictures (B, 5, 80, 80), words (B, 20); padding: True = ignore -> boxes (B, 4), cxcywh in [0, 1]."""
        batch = len(pictures)
        visual = self.patches(pictures).flatten(2).permute(2, 0, 1)  # (400, B, D)
        tokens = torch.cat([self.reg.expand(-1, batch, -1), self.words(words).transpose(0, 1), visual])
        no_picture = picture_padding[:, ::PATCH, ::PATCH].flatten(1)
        padding = torch.cat([word_padding.new_zeros(batch, 1), word_padding, no_picture], dim=1)
        for layer in self.fusion:
            tokens = layer(tokens, self.positions, padding)
        return self.head(tokens[0]).sigmoid()


class FusionLayer(nn.Module):
    """Post-norm; positions are added to queries and keys, not to values."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, 2)
        self.feedforward = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))

    def forward(self, tokens: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
        placed = tokens + positions
        attended, _ = self.self_attn(placed, placed, tokens, key_padding_mask=padding, need_weights=False)
        tokens = self.norms[0](tokens + attended)
        return self.norms[1](tokens + self.feedforward(tokens))


def box_iou(predicted: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and GIoU of boxes (B, 4), cxcywh."""
    low, high = predicted[:, :2] - predicted[:, 2:] / 2, predicted[:, :2] + predicted[:, 2:] / 2
    true_low, true_high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    common = (torch.minimum(high, true_high) - torch.maximum(low, true_low)).clamp(min=0).prod(1)
    hull = (torch.maximum(high, true_high) - torch.minimum(low, true_low)).prod(1)
    union = predicted[:, 2:].prod(1) + boxes[:, 2:].prod(1) - common
    return common / union, common / union - (hull - union) / hull


def box_loss(predicted: Tensor, boxes: Tensor) -> Tensor:
    """L1 + (1 - GIoU), the mean over the batch."""
    return ((predicted - boxes).abs().sum(1) + 1 - box_iou(predicted, boxes)[1]).mean()


def accuracy(predicted: Tensor, boxes: Tensor) -> float:
    """The share of boxes with IoU >= 0.5."""
    return (box_iou(predicted, boxes)[0] >= 0.5).float().mean().item()


COLOURS = torch.tensor(
    [[0.9, 0.1, 0.1], [0.1, 0.8, 0.2], [0.2, 0.3, 0.9], [0.9, 0.8, 0.1], [0.8, 0.2, 0.8], [0.1, 0.8, 0.8]]
)
FILLERS = 5  # words that say nothing
VOCABULARY = 1 + len(COLOURS) + FILLERS  # 0 is padding


def scenes(count: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """[pictures, picture padding, words, word padding] and boxes (B, 4) on the padded canvas.

    A picture (5 channels, normalised: red, green, blue, x, y) fills the upper left of the canvas. About half of the
    words say the colour of the box that is meant.
    """
    generator = torch.Generator().manual_seed(seed)
    pixel = (torch.arange(SIZE) + 0.5) / SIZE
    filled = 0.7 + 0.3 * torch.rand(count, 2, generator=generator)  # width and height of the picture
    pictures = 0.2 * torch.rand(count, 3, SIZE, SIZE, generator=generator)
    colours = torch.rand(count, len(COLOURS), generator=generator).argsort(1)
    for drawn in range(4):
        extent = filled * (0.2 + 0.3 * torch.rand(count, 2, generator=generator))
        centre = extent / 2 + torch.rand(count, 2, generator=generator) * (filled - extent)
        across, down = ((pixel - centre[..., None]).abs() < extent[..., None] / 2).unbind(1)
        inside = (down[:, :, None] & across[:, None, :])[:, None]
        pictures = torch.where(inside, COLOURS[colours[:, drawn], :, None, None], pictures)
    beyond_right, beyond_bottom = (pixel > filled[..., None]).unbind(1)
    picture_padding = beyond_bottom[:, :, None] | beyond_right[:, None, :]
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")
    places = torch.stack([x, y]).expand(count, -1, -1, -1)
    pictures = (torch.cat([pictures, places], dim=1) - 0.5) / 0.25
    pictures = pictures.masked_fill(picture_padding[:, None], 0)
    length = torch.randint(5, WORDS + 1, (count, 1), generator=generator)
    words = torch.randint(1 + len(COLOURS), VOCABULARY, (count, WORDS), generator=generator)
    names_it = torch.rand(count, WORDS, generator=generator) < 0.5
    words = torch.where(names_it, 1 + colours[:, 3:4], words).masked_fill(torch.arange(WORDS) >= length, 0)
    return [pictures, picture_padding, words, words == 0], torch.cat([centre, extent], dim=1)
