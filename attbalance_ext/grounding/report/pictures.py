"""Test images with attention, the true box and each run's box: what changed for the better, and for the worse."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from attbalance_ext.grounding.evaluate import Evaluation, attention_pictures
from attbalance_ext.grounding.runs import Run
from attbalance_ext.grounding.split import Split


@dataclass(frozen=True)
class Panel:
    """One run's answer to one sentence."""

    run: int
    picture: Markup
    iou: float
    in_box: float


@dataclass(frozen=True)
class Example:
    """One test sentence, its scene with the true box, and every run's answer."""

    sentence: str
    scene: Markup
    panels: list[Panel]


@dataclass(frozen=True)
class Group:
    """Examples with one outcome; ``count`` of ``total`` test sentences have it."""

    title: str
    count: int
    total: int
    examples: list[Example]


def picture_groups(
    runs: Sequence[Run],
    splits: Sequence[Split],
    evaluations: Sequence[Evaluation],
    *,
    per_group: int,
    seed: int,
) -> list[Group]:
    """Examples for every outcome of the first run against the last one.

    Within an outcome the examples are drawn at random (``seed``), not chosen: the pictures show wins and losses as
    they come, and the counts say how common each is.
    """
    first, last = (evaluation.iou >= 0.5 for evaluation in (evaluations[0], evaluations[-1]))
    names = runs[0].directory.name, runs[-1].directory.name
    if len(runs) == 1:
        outcomes = [(f"{names[0]} is right", first), (f"{names[0]} is wrong", ~first)]
    else:
        outcomes = [
            (f"Won: {names[0]} wrong, {names[1]} right", ~first & last),
            (f"Lost: {names[0]} right, {names[1]} wrong", first & ~last),
            ("Both right", first & last),
            ("Both wrong", ~first & ~last),
        ]
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for title, mask in outcomes:
        found = mask.nonzero().flatten()
        drawn = found[torch.randperm(len(found), generator=generator)[:per_group]].sort().values
        examples = _examples(runs, splits, evaluations, drawn) if len(drawn) else []
        groups.append(Group(title, len(found), len(mask), examples))
    return groups


def _examples(
    runs: Sequence[Run], splits: Sequence[Split], evaluations: Sequence[Evaluation], indices: Tensor
) -> list[Example]:
    maps = [attention_pictures(run.model, split, indices) for run, split in zip(runs, splits, strict=True)]
    examples = []
    for row, index in enumerate(indices.tolist()):
        view = splits[0].view(index)
        image, truth = _data_uri(_scene(view.image)), view.box
        panels = []
        for number, (run, evaluation, (attention, boxes)) in enumerate(zip(runs, evaluations, maps, strict=True)):
            veil = _veil(attention[-1, row], run.model.grids[0])
            panels.append(
                Panel(
                    run=number,
                    picture=_svg(image, [("truth", truth), (f"run{number}", boxes[row])], veil),
                    iou=evaluation.iou[index].item(),
                    in_box=evaluation.in_box[-1, index].item(),
                )
            )
        examples.append(Example(view.sentence, _svg(image, [("truth", truth)]), panels))
    return examples


def _svg(image: str, boxes: Sequence[tuple[str, Tensor]], veil: str | None = None) -> Markup:
    """A scene of 100 x 100 units; boxes by CSS class."""
    parts = [
        '<svg class="picture" viewBox="0 0 100 100" role="img" aria-label="scene">',
        f'<image class="scene" href="{image}" width="100" height="100"/>',
    ]
    if veil is not None:
        parts.append(f'<image href="{veil}" width="100" height="100" preserveAspectRatio="none"/>')
    for name, box in boxes:
        cx, cy, w, h = (100 * box).tolist()
        place = f'x="{cx - w / 2:.1f}" y="{cy - h / 2:.1f}" width="{w:.1f}" height="{h:.1f}"'
        parts.append(f'<rect class="halo" {place}/><rect class="box {name}" {place}/>')
    return Markup("".join([*parts, "</svg>"]))  # noqa: S704 - numbers, our own class names and encoded pixels


def _scene(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _veil(attention: Tensor, grid: tuple[int, int]) -> str:
    """One pixel per visual token: dark where the query does not look, clear where it looks most."""
    relative = (attention[: grid[0] * grid[1]] / attention.max()).reshape(grid)
    alpha = (185 * (1 - relative.sqrt())).round().to(torch.uint8)
    pixels = torch.stack([torch.full_like(alpha, value) for value in (8, 10, 30)] + [alpha], dim=-1)
    return _data_uri(Image.fromarray(pixels.numpy(), "RGBA"))


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
