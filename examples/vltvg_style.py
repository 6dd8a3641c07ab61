"""A VLTVG-style decoder: stages of one object query, an auxiliary box of every stage, cross-attention tapped.

In each stage the query reads the words, then looks at the picture; both are `nn.MultiheadAttention`. Every stage gives
a box. The loss takes them all, (S, B, 4): box losses are summed over the stages, and rho is taken with the last one's.

    python examples/vltvg_style.py
    python examples/vltvg_style.py --steps 30    # a quick look

Lines that end in `# +` are what AttBalance adds to plain training.
"""

import argparse

import torch
from torch import Tensor, nn

from attbalance_ext import (  # +
    AttBalanceConfig,  # +
    AttBalanceLoss,  # +
    AttentionTap,  # +
    BoxRegion,  # +
    MomentumTeacher,  # +
    attention_terms,  # +
)  # +

GRID = (8, 8)
STAGES = 6


def make_tap(model: nn.Module) -> AttentionTap:  # +
    """The visual cross-attention of the last four stages. Its keys are the visual tokens alone: no `visual` needed."""
    return AttentionTap([stage.look for stage in model.stages[-4:]])  # +


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tap, teacher = make_tap(model), MomentumTeacher(model, make_tap)  # +
    criterion = AttBalanceLoss(AttBalanceConfig(alpha_l1=5.0, alpha_giou=2.0))  # + VLTVG's weights
    for step in range(steps):
        pictures, words, boxes = scenes(32, seed=step)
        teacher.update(model)  # +
        with tap.recording():  # +
            predicted = model(pictures, words)  # (S, B, 4)
        seen = teacher.attention(pictures, words)  # +
        terms = attention_terms(tap.attention(), BoxRegion(boxes, GRID), teacher=seen)  # +
        loss = criterion(terms, predicted, boxes).loss  # + in place of L1 and GIoU summed over the stages
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


class Stage(nn.Module):
    """The query reads the words, then looks at the picture."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.read = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.look = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.feedforward = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(self, query: Tensor, words: Tensor, padding: Tensor, visual: Tensor) -> Tensor:
        read, _ = self.read(query, words, words, key_padding_mask=padding, need_weights=False)
        asked = self.norms[0](query + read)
        looked, _ = self.look(asked, visual, visual, need_weights=False)
        query = self.norms[1](asked + looked)
        return self.norms[2](query + self.feedforward(query))


class Grounder(nn.Module):
    def __init__(self, dim: int = 32, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(5, dim, patch, stride=patch)
        self.encoder = nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True)
        self.words = nn.Embedding(WORDS, dim, padding_idx=0)
        self.query = nn.Parameter(torch.randn(1, dim) * 0.02)
        self.stages = nn.ModuleList(Stage(dim) for _ in range(STAGES))
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4))

    def forward(self, pictures: Tensor, words: Tensor) -> Tensor:
        """pictures (B, 5, 32, 32), words (B, 4) padded with 0 -> boxes of every stage (S, B, 4)."""
        visual = self.encoder(self.patches(pictures).flatten(2).transpose(1, 2))
        query, text = self.query.expand(len(pictures), 1, -1), self.words(words)
        boxes = []
        for stage in self.stages:
            query = stage(query, text, words == 0, visual)
            boxes.append(self.head(query[:, 0]).sigmoid())
        return torch.stack(boxes)


COLOURS = torch.tensor(
    [[0.9, 0.1, 0.1], [0.1, 0.8, 0.2], [0.2, 0.3, 0.9], [0.9, 0.8, 0.1], [0.8, 0.2, 0.8], [0.1, 0.8, 0.8]]
)
FILLERS = 3  # words that say nothing
WORDS = 1 + len(COLOURS) + FILLERS  # 0 is padding


def scenes(count: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (B, 5, size, size): red, green, blue, x, y; one to four words (B, 4), one a colour; its box (B, 4)."""
    generator = torch.Generator().manual_seed(seed)
    pixel = (torch.arange(size) + 0.5) / size
    pictures = 0.2 * torch.rand(count, 3, size, size, generator=generator)
    colours = torch.rand(count, len(COLOURS), generator=generator).argsort(1)
    for drawn in range(4):
        extent = 0.2 + 0.3 * torch.rand(count, 2, generator=generator)
        centre = extent / 2 + torch.rand(count, 2, generator=generator) * (1 - extent)
        across, down = ((pixel - centre[..., None]).abs() < extent[..., None] / 2).unbind(1)
        inside = (down[:, :, None] & across[:, None, :])[:, None]
        pictures = torch.where(inside, COLOURS[colours[:, drawn], :, None, None], pictures)
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")
    places = torch.stack([x, y]).expand(count, -1, -1, -1)
    length = torch.randint(1, 5, (count, 1), generator=generator)
    words = torch.randint(1 + len(COLOURS), WORDS, (count, 4), generator=generator)
    position = (torch.rand(count, 1, generator=generator) * length).long()
    words.scatter_(1, position, 1 + colours[:, 3:4]).masked_fill_(torch.arange(4) >= length, 0)
    return torch.cat([pictures, places], dim=1), words, torch.cat([centre, extent], dim=1)


@torch.no_grad()
def report(name: str, model: Grounder) -> None:
    """The box loss, accuracy at IoU 0.5 and attention in the box (last stage) on 200 pictures not trained on."""
    pictures, words, boxes = scenes(200, seed=10**6)
    model.eval()
    tap = make_tap(model)
    with tap.recording():
        predicted = model(pictures, words)
    in_box = attention_terms(tap.attention(), BoxRegion(boxes, GRID)).in_box[-1].mean()
    tap.remove()
    model.train()
    output = AttBalanceLoss()(None, predicted[-1], boxes)
    accuracy = (output.iou >= 0.5).float().mean()
    print(f"{name:<7} loss {output.loss:.3f}  accuracy {accuracy:6.1%}  attention in the box {in_box:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    model = Grounder()
    report("before", model)
    train(model, steps)
    report("after", model)


if __name__ == "__main__":
    main()
