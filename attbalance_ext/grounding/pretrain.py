"""Language-free pre-training of an image encoder: what lies in each cell, and where.

The analogue of starting from DETR's weights.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attbalance_ext import AttBalanceConfig, AttBalanceLoss, BoxRegion
from attbalance_ext.grounding.data import VALUES, GroundingDataset, Objects
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.files import exclusive, load_checkpoint, save_checkpoint
from attbalance_ext.grounding.models.vision import ConvEncoder
from attbalance_ext.grounding.order import DataOrder
from attbalance_ext.grounding.progress import progress_bars

BATCH_SIZE = 64
LEARNING_RATE = 3e-3
SEED = 0
"""One encoder for every training seed, as everyone starts from the same published DETR."""


def load_pretrained(
    encoder: ConvEncoder, dataset: GroundingDataset, steps: int, device: torch.device, folder: Path
) -> None:
    """Pre-train ``encoder`` on the scenes of ``dataset`` and keep the result in ``folder``; the next call reads it.

    A file that is damaged or of another version is made again.
    """
    path = folder / f"{_fingerprint(encoder, dataset, steps)}.pt"
    if _loaded(encoder, path):  # without the lock: a cache that is complete may be read-only
        return
    with exclusive(path):  # of several processes one trains, and the others read
        if not _loaded(encoder, path):
            pretrain(encoder, dataset, steps, device)
            save_checkpoint(path, {"encoder": encoder.state_dict()})


def _loaded(encoder: ConvEncoder, path: Path) -> bool:
    try:
        encoder.load_state_dict(load_checkpoint(path)["encoder"])
    except (UserError, KeyError, RuntimeError):
        return False
    return True


def pretrain(encoder: ConvEncoder, dataset: GroundingDataset, steps: int, device: torch.device) -> None:
    """Train ``encoder`` in place, then freeze it."""
    torch.manual_seed(SEED)
    encoder.to(device).train().requires_grad_(True)
    task = CellTask(encoder.dim, dataset.objects, encoder.grid).to(device)
    parameters = [*encoder.parameters(), *task.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.15)
    order = DataOrder(len(dataset.images), BATCH_SIZE, SEED)
    with progress_bars() as progress:
        bar = progress.add_task("pre-training without language", total=steps, note="")
        for step in range(steps):
            scenes = order.indices(step)
            loss = task(encoder(dataset.images[scenes].to(device)), scenes.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            progress.update(bar, completed=step + 1)
    encoder.eval().requires_grad_(False)


class CellTask(nn.Module):
    """Says, for every cell of the grid, whether an object lies there, its attributes and its absolute box.

    One linear layer on the cell's token: what pre-training teaches is then linearly readable for the fusion.
    """

    targets: Tensor
    boxes: Tensor
    labels: Tensor

    def __init__(self, dim: int, objects: Objects, grid: tuple[int, int]) -> None:
        super().__init__()
        self.classes = [len(values) for values in VALUES.values()]
        self.read = nn.Linear(dim, 1 + sum(self.classes) + 4)
        self.box_loss = AttBalanceLoss(AttBalanceConfig(alpha_l1=5.0))
        self.register_buffer("targets", cell_targets(objects, grid), persistent=False)
        self.register_buffer("boxes", objects.boxes, persistent=False)
        self.register_buffer("labels", torch.stack([getattr(objects, kind) for kind in VALUES], -1), persistent=False)

    def forward(self, tokens: Tensor, scenes: Tensor) -> Tensor:
        """The loss of tokens (B, N, D) of ``scenes`` (B,)."""
        slot = self.targets[scenes]
        occupied = slot >= 0
        there, *attributes, box = self.read(tokens).split([1, *self.classes, 4], dim=-1)
        loss = F.binary_cross_entropy_with_logits(there[..., 0], occupied.float())
        which = scenes[:, None].expand_as(slot)[occupied], slot[occupied]
        for kind, logits in enumerate(attributes):
            loss = loss + F.cross_entropy(logits[occupied], self.labels[which][:, kind])
        return loss + self.box_loss(None, box[occupied].sigmoid(), self.boxes[which]).loss


def cell_targets(objects: Objects, grid: tuple[int, int]) -> Tensor:
    """(S, N) int64: the slot of the object whose box holds the cell's centre, or whose centre the cell holds; or -1."""
    height, width = grid
    scenes, slots = objects.present.shape
    boxes = objects.boxes.flatten(0, 1)
    inside = BoxRegion(boxes, (grid,), rule="center").mask() > 0
    column = (boxes[:, 0] * width).long().clamp(max=width - 1)
    row = (boxes[:, 1] * height).long().clamp(max=height - 1)
    inside[torch.arange(len(inside)), row * width + column] = True
    inside = inside.unflatten(0, (scenes, slots)) & objects.present[..., None]
    return torch.where(inside.any(1), inside.int().argmax(1), -1)


def _fingerprint(encoder: ConvEncoder, dataset: GroundingDataset, steps: int) -> str:
    """Changes with the scenes, the encoder's layout and the recipe, so that no old file is taken for a new one."""
    digest = hashlib.sha256(dataset.images.numpy().tobytes())
    layout = [(name, tuple(value.shape)) for name, value in encoder.state_dict().items()]
    digest.update(repr((layout, steps, BATCH_SIZE, LEARNING_RATE, SEED)).encode())
    return digest.hexdigest()[:20]
