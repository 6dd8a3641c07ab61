"""Hugging Face DETR: many object queries, of which one is picked for each sample after matching.

The model looks for the red box. As in DETR, the prediction that costs least to call the red one is matched to it; its
query is the object query of that picture, and its attention in the decoder's cross-attention is supervised.

    python examples/detr_transformers.py
    python examples/detr_transformers.py --steps 30    # a quick look

Lines that end in `# +` are what AttBalance adds to plain training. Needs `pip install transformers`.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from attbalance_ext import AttBalanceLoss, BoxRegion, MomentumTeacher, attention_terms  # +
from attbalance_ext.integrations.transformers import TransformersTap  # +

QUERIES = 8


def make_tap(model: nn.Module) -> TransformersTap:  # +
    layers = [layer.encoder_attn for layer in model.model.decoder.layers[-4:]]  # +
    return TransformersTap(layers, query=slice(None))  # + all of them: which one counts is known after matching


def train(model: DetrForObjectDetection, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tap, teacher, criterion = make_tap(model), MomentumTeacher(model, make_tap), AttBalanceLoss()  # +
    for step in range(steps):
        pictures, boxes = scenes(16, seed=step)
        teacher.update(model)  # +
        with tap.recording():  # +
            output = model(pixel_values=pictures)
        matched = match(output, boxes)
        seen = teacher.attention(pixel_values=pictures, query=matched)  # + the teacher's attention of the same queries
        terms = attention_terms(tap.attention(query=matched), BoxRegion(boxes, (8, 8)), teacher=seen)  # +
        predicted = output.pred_boxes[torch.arange(len(boxes)), matched]
        box_loss = criterion(terms, predicted, boxes).loss  # + in place of L1 + GIoU
        loss = box_loss + class_loss(output.logits, matched)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def match(output, boxes: Tensor) -> Tensor:
    """The query (B,) whose prediction costs least. (With several boxes a picture: scipy's linear_sum_assignment.)"""
    cost = 5 * (output.pred_boxes - boxes[:, None]).abs().sum(2) - output.logits.softmax(2)[..., 0]
    return cost.argmin(1)


def class_loss(logits: Tensor, matched: Tensor) -> Tensor:
    """The matched query says "the red box" (0), the others "nothing" (1), which counts a tenth."""
    truth = torch.ones(logits.shape[:2], dtype=torch.long, device=logits.device)
    truth[torch.arange(len(matched)), matched] = 0
    return F.cross_entropy(logits.flatten(0, 1), truth.flatten(), weight=logits.new_tensor([1.0, 0.1]))


def tiny_detr() -> DetrForObjectDetection:
    """Random weights: an 8 x 8 map of a 64 x 64 picture, one encoder layer, six decoder layers."""
    backbone = ResNetConfig(
        num_channels=5,
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    config = DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        num_channels=5,
        d_model=32,
        encoder_layers=1,
        decoder_layers=6,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=QUERIES,
        num_labels=1,
        dropout=0.0,
        init_std=0.15,  # DETR's 0.02 is for a width of 256
    )
    model = DetrForObjectDetection(config)
    model.model.backbone.requires_grad_(True)  # DETR freezes what comes pre-trained; here nothing does
    return model


COLOURS = torch.tensor(
    [[0.9, 0.1, 0.1], [0.1, 0.8, 0.2], [0.2, 0.3, 0.9], [0.9, 0.8, 0.1], [0.8, 0.2, 0.8], [0.1, 0.8, 0.8]]
)


def scenes(count: int, seed: int, size: int = 64) -> tuple[Tensor, Tensor]:
    """Pictures (B, 5, size, size): red, green, blue, x, y; the red one of their four boxes (B, 4), cxcywh in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    pixel = (torch.arange(size) + 0.5) / size
    pictures = 0.2 * torch.rand(count, 3, size, size, generator=generator)
    for colour in (2, 3, 1, 0):
        extent = 0.2 + 0.3 * torch.rand(count, 2, generator=generator)
        centre = extent / 2 + torch.rand(count, 2, generator=generator) * (1 - extent)
        across, down = ((pixel - centre[..., None]).abs() < extent[..., None] / 2).unbind(1)
        inside = (down[:, :, None] & across[:, None, :])[:, None]
        pictures = torch.where(inside, COLOURS[colour, :, None, None], pictures)
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")
    places = torch.stack([x, y]).expand(count, -1, -1, -1)
    return torch.cat([pictures, places], dim=1), torch.cat([centre, extent], dim=1)


@torch.no_grad()
def report(name: str, model: DetrForObjectDetection) -> None:
    """Of the query that is surest to be the red box, on 100 pictures not trained on: box loss, accuracy, attention."""
    pictures, boxes = scenes(100, seed=10**6)
    model.eval()
    tap = make_tap(model)
    with tap.recording():
        output = model(pixel_values=pictures)
    chosen = output.logits[..., 0].argmax(1)
    in_box = attention_terms(tap.attention(query=chosen), BoxRegion(boxes, (8, 8))).in_box[-1].mean()
    tap.remove()
    model.train()
    result = AttBalanceLoss()(None, output.pred_boxes[torch.arange(len(boxes)), chosen], boxes)
    accuracy = (result.iou >= 0.5).float().mean()
    print(f"{name:<7} loss {result.loss:.3f}  accuracy {accuracy:6.1%}  attention in the box {in_box:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    model = tiny_detr()
    report("before", model)
    train(model, steps)
    report("after", model)


if __name__ == "__main__":
    main()
