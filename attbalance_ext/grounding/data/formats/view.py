"""A split as the writers see it: file names, boxes in pixels, one row per sentence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.progress import track

from ...console import messages
from ...files import replace_file
from ..dataset import pixel_corners, sentences_of
from ..generate import Arrays
from ..names import BuiltinName


class Row(NamedTuple):
    """A sentence: its scene, the position of its object among the scene's, and the object's box."""

    scene: int
    target: int
    box: np.ndarray
    """(4,) float32 cxcywh in [0, 1]."""
    sentence: str


@dataclass(frozen=True)
class SplitView:
    name: BuiltinName
    split: str
    arrays: Arrays
    size: int

    def rows(self) -> Iterator[Row]:
        arrays = self.arrays
        scenes, targets = arrays["scene_index"].tolist(), arrays["target"].tolist()
        return map(Row, scenes, targets, arrays["boxes"], sentences_of(arrays))

    def image_name(self, scene: int) -> str:
        """Distinct over flavours and splits, which share a folder in some formats."""
        flavour = self.name.flavour.replace("+", "plus")
        return f"builtin_{flavour}{'_hard' if self.name.hard else ''}_{self.split}_{scene:06d}.png"

    def xyxy(self, box: np.ndarray) -> list[float]:
        """A cxcywh box as [x1, y1, x2, y2] in pixels."""
        return list(pixel_corners(box.tolist(), self.size))

    def xywh(self, box: np.ndarray) -> list[float]:
        """A cxcywh box as [x1, y1, width, height] in pixels."""
        x1, y1, x2, y2 = self.xyxy(box)
        return [x1, y1, x2 - x1, y2 - y1]

    def write_images(self, folder: Path, progress: bool) -> None:
        images = track(
            self.arrays["images"].transpose(0, 2, 3, 1),
            description=f"Writing {self.name} {self.split}",
            console=messages(),
            disable=not progress,
        )
        for scene, pixels in enumerate(images):
            replace_file(
                folder / self.image_name(scene), partial(Image.fromarray(pixels).save, format="PNG"), durable=False
            )
