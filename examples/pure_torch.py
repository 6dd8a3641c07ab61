"""Your own fusion stack and a plain loop, trained without and with AttBalance.

Six `nn.TransformerEncoder` layers read [REG, the word, 8 x 8 visual tokens]; REG's output gives the box. The pictures
show four boxes in different colours; the word names one of the colours.

    python examples/pure_torch.py
    python examples/pure_torch.py --steps 30    # a quick look

Lines that end in `# +` are what AttBalance adds to plain training. The README shows the same code.
"""

import argparse

import torch
from torch import Tensor, nn

from attbalance_ext import AttBalanceLoss, AttentionTap, BoxRegion, MomentumTeacher, attention_terms  # +

COLOURS = torch.tensor(
    [[0.9, 0.1, 0.1], [0.1, 0.8, 0.2], [0.2, 0.3, 0.9], [0.9, 0.8, 0.1], [0.8, 0.2, 0.8], [0.1, 0.8, 0.8]]
)


class Grounder(nn.Module):
    """Patches, a word and REG through one encoder."""

    def __init__(self, dim: int = 32, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(5, dim, patch, stride=patch)
        self.words = nn.Embedding(len(COLOURS), dim)
        self.reg = nn.Parameter(torch.randn(1, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4))

    def forward(self, pictures: Tensor, words: Tensor) -> Tensor:
        """pictures (B, 5, 32, 32), words (B,) -> boxes (B, 4), cxcywh in [0, 1]."""
        visual = self.patches(pictures).flatten(2).transpose(1, 2)
        reg = self.reg.expand(len(pictures), 1, -1)
        tokens = torch.cat([reg, self.words(words)[:, None], visual], dim=1)
        return self.head(self.encoder(tokens)[:, 0]).sigmoid()


def train_plain(model, loader, optimizer):
    for pictures, words, boxes in loader:
        predicted = model(pictures, words)
        loss = box_loss(predicted, boxes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def make_tap(model):  # +
    return AttentionTap([layer.self_attn for layer in model.encoder.layers[-4:]], query=0, visual=slice(2, 66))  # +


def train(model, loader, optimizer):
    tap, teacher, criterion = make_tap(model), MomentumTeacher(model, make_tap), AttBalanceLoss()  # +
    for pictures, words, boxes in loader:
        teacher.update(model)  # +
        with tap.recording():  # +
            predicted = model(pictures, words)
        seen = teacher.attention(pictures, words)  # +
        terms = attention_terms(tap.attention(), BoxRegion(boxes, (8, 8)), teacher=seen)  # +
        loss = criterion(terms, predicted, boxes).loss  # + in place of box_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def box_loss(predicted: Tensor, boxes: Tensor) -> Tensor:
    """L1 + (1 - GIoU), the mean over the batch."""
    low, high = predicted[:, :2] - predicted[:, 2:] / 2, predicted[:, :2] + predicted[:, 2:] / 2
    true_low, true_high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    common = (torch.minimum(high, true_high) - torch.maximum(low, true_low)).clamp(min=0).prod(1)
    hull = (torch.maximum(high, true_high) - torch.minimum(low, true_low)).prod(1)
    union = predicted[:, 2:].prod(1) + boxes[:, 2:].prod(1) - common
    giou = common / union - (hull - union) / hull
    return ((predicted - boxes).abs().sum(1) + 1 - giou).mean()


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
    """The box loss, accuracy at IoU 0.5 and attention in the box (last layer) on 200 pictures not trained on."""
    pictures, words, boxes = scenes(200, seed=-1)
    model.eval()
    tap = make_tap(model)
    with tap.recording():
        predicted = model(pictures, words)
    in_box = attention_terms(tap.attention(), BoxRegion(boxes, (8, 8))).in_box[-1].mean()
    tap.remove()
    model.train()
    iou = AttBalanceLoss()(None, predicted, boxes).iou
    accuracy = (iou >= 0.5).float().mean()
    print(
        f"{name:<18} loss {box_loss(predicted, boxes):.3f}  accuracy {accuracy:6.1%}  attention in the box {in_box:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160)
    steps = parser.parse_args().steps
    loader = [scenes(32, seed) for seed in range(steps)]
    for name, training in (("plain", train_plain), ("AttBalance", train)):
        torch.manual_seed(0)  # the same first weights
        model = Grounder()
        report(f"{name}, before", model)
        training(model, loader, torch.optim.AdamW(model.parameters(), lr=2e-3))
        report(f"{name}, after", model)


if __name__ == "__main__":
    main()
