"""QRNet-style visual tokens: a fine grid, then a coarse one, in one sequence.

The fusion reads [REG, the word, fine tokens, coarse tokens]. The region lists the grids in the tokens' order, and the
box is rasterised on both. (QRNet: 20 x 20, then 10 x 10; `--cells 20` makes it so.)

    python examples/qrnet_grids.py
    python examples/qrnet_grids.py --cells 20
    python examples/qrnet_grids.py --steps 30    # a quick look

Lines that end in `# +` are what AttBalance adds to plain training.
"""

import argparse

import torch
from torch import Tensor, nn

from attbalance_ext import AttBalanceLoss, AttentionTap, BoxRegion, MomentumTeacher, attention_terms  # +


def make_tap(model: nn.Module) -> AttentionTap:  # +
    tokens = sum(height * width for height, width in model.grids)  # +
    return AttentionTap([layer.self_attn for layer in model.layers[-4:]], query=0, visual=slice(2, 2 + tokens))  # +


def train(model: nn.Module, steps: int, batch: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tap, teacher, criterion = make_tap(model), MomentumTeacher(model, make_tap), AttBalanceLoss()  # +
    for step in range(steps):
        pictures, words, boxes = scenes(batch, seed=step, size=model.size)
        teacher.update(model)  # +
        with tap.recording():  # +
            predicted = model(pictures, words)
        seen = teacher.attention(pictures, words)  # +
        terms = attention_terms(tap.attention(), BoxRegion(boxes, model.grids), teacher=seen)  # +
        loss = criterion(terms, predicted, boxes).loss  # + in place of L1 + GIoU
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


class Grounder(nn.Module):
    def __init__(self, cells: int, dim: int = 32, patch: int = 4) -> None:
        super().__init__()
        self.grids = ((cells, cells), (cells // 2, cells // 2))
        self.size = cells * patch
        self.words = nn.Embedding(len(COLOURS), dim)
        self.fine = nn.Conv2d(5, dim, patch, stride=patch)
        self.gate = nn.Linear(dim, dim)  # the sentence says which channels matter
        self.coarse = nn.Conv2d(dim, dim, 2, stride=2)
        self.scales = nn.Parameter(torch.randn(2, dim) * 0.02)
        self.reg = nn.Parameter(torch.randn(1, dim) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True) for _ in range(6)
        )
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4))

    def forward(self, pictures: Tensor, words: Tensor) -> Tensor:
        """pictures (B, 5, size, size), words (B,) -> boxes (B, 4), cxcywh in [0, 1]."""
        text = self.words(words)
        fine = self.fine(pictures) * self.gate(text).sigmoid()[:, :, None, None]
        levels = [level.flatten(2).transpose(1, 2) for level in (fine, self.coarse(fine))]
        reg = self.reg.expand(len(pictures), 1, -1)
        tokens = torch.cat([reg, text[:, None], levels[0] + self.scales[0], levels[1] + self.scales[1]], dim=1)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(tokens[:, 0]).sigmoid()


COLOURS = torch.tensor(
    [[0.9, 0.1, 0.1], [0.1, 0.8, 0.2], [0.2, 0.3, 0.9], [0.9, 0.8, 0.1], [0.8, 0.2, 0.8], [0.1, 0.8, 0.8]]
)


def scenes(count: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (B, 5, size, size): red, green, blue, x, y; the colour asked for (B,); its box (B, 4)."""
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
    return torch.cat([pictures, places], dim=1), colours[:, 3], torch.cat([centre, extent], dim=1)


@torch.no_grad()
def report(name: str, model: Grounder) -> None:
    """The box loss, accuracy at IoU 0.5 and attention in the box (last layer) on 100 pictures not trained on."""
    pictures, words, boxes = scenes(100, seed=10**6, size=model.size)
    model.eval()
    tap = make_tap(model)
    with tap.recording():
        predicted = model(pictures, words)
    in_box = attention_terms(tap.attention(), BoxRegion(boxes, model.grids)).in_box[-1].mean()
    tap.remove()
    model.train()
    output = AttBalanceLoss()(None, predicted, boxes)
    accuracy = (output.iou >= 0.5).float().mean()
    print(f"{name:<7} loss {output.loss:.3f}  accuracy {accuracy:6.1%}  attention in the box {in_box:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--cells", type=int, default=8, help="of the fine grid, along each side")
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Grounder(args.cells)
    report("before", model)
    train(model, args.steps, args.batch)
    report("after", model)


if __name__ == "__main__":
    main()
