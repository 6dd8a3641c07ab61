"""From a picture, a box and a sentence to what a model sees: a square canvas, with or without augmentation.

Geometry is planned first (which part of the picture, how large, where on the canvas) and pixels are resampled once.
The scale is the same along both axes to the last bit, so that a box on the canvas is exactly the box in the picture.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .annotations import Box
from .colours import blur, jitter
from .crop import intersection, random_crop
from .flip import mirror

FILL = (124, 116, 104)
"""What surrounds the picture: the mean colour of ImageNet, which is about 0 once pixels are normalised."""
_ROUNDING = 1e-6
_REDUCING_GAP = 3.0
"""Pillow halves by whole factors before it resamples, as long as the picture stays this many times too large."""


class View(NamedTuple):
    """A sample on a canvas of side S."""

    image: Tensor
    """(3, S, S) uint8, RGB."""
    padding: Tensor
    """(S, S) bool, True where the canvas shows no picture."""
    box: Tensor
    """(4,) float32 cxcywh in [0, 1] of the canvas."""
    box_ratio: float
    """Box area / area of the picture as it is shown, without padding."""
    sentence: str
    to_source: tuple[float, float, float]
    """(scale, dx, dy): a point (x, y) of the canvas in pixels is (scale x + dx, scale y + dy) in the picture. In a
    mirrored view it is that in the mirrored picture."""


@dataclass(frozen=True)
class Placement:
    """Which part of a picture is shown, how large and where on the canvas."""

    canvas: int
    """Side in pixels."""
    part: Box
    """In pixels of the picture."""
    scale: float
    """Pixels of the canvas per pixel of the picture."""
    size: tuple[int, int]
    """(width, height) on the canvas; a last column or row that would be shown in part is left out."""
    corner: tuple[int, int]
    """(left, top) on the canvas."""

    @classmethod
    def fit(cls, part: Box, canvas: int, longer: int, place: tuple[float, float] = (0.5, 0.5)) -> Placement:
        """``part`` with its longer side ``longer`` pixels long. ``place``: the share of the free room before it."""
        extent = (part.x2 - part.x1, part.y2 - part.y1)
        scale = longer / max(extent)
        width, height = (max(1, int(side * scale + _ROUNDING)) for side in extent)
        corner = (int((canvas - width) * place[0]), int((canvas - height) * place[1]))
        return cls(canvas, part, scale, (width, height), corner)

    def resample(self, image: Image.Image) -> Image.Image:
        """The part as it is shown: bilinear, over as many pixels as fall on one."""
        (width, height), part = self.size, self.part
        window = (
            part.x1,
            part.y1,
            min(part.x2, part.x1 + width / self.scale),
            min(part.y2, part.y1 + height / self.scale),
        )
        return image.resize(self.size, Image.Resampling.BILINEAR, box=window, reducing_gap=_REDUCING_GAP)

    def view(self, picture: Image.Image, box: Box, sentence: str) -> View:
        """``picture`` on the canvas, with what of ``box`` (in pixels of the source) lies in the part."""
        (left, top), (width, height), part = self.corner, self.size, self.part
        drawn = Image.new("RGB", (self.canvas, self.canvas), FILL)
        drawn.paste(picture, self.corner)
        padding = torch.ones(self.canvas, self.canvas, dtype=torch.bool)
        padding[top : top + height, left : left + width] = False
        shown = intersection(box, part)
        across, down = shown.x2 - shown.x1, shown.y2 - shown.y1
        center_x = left + ((shown.x1 + shown.x2) / 2 - part.x1) * self.scale
        center_y = top + ((shown.y1 + shown.y2) / 2 - part.y1) * self.scale
        target = torch.tensor([center_x, center_y, across * self.scale, down * self.scale], dtype=torch.float64)
        return View(
            image=torch.from_numpy(np.array(drawn)).permute(2, 0, 1).contiguous(),
            padding=padding,
            box=(target / self.canvas).float(),
            box_ratio=across * down / ((part.x2 - part.x1) * (part.y2 - part.y1)),
            sentence=sentence,
            to_source=(1 / self.scale, part.x1 - left / self.scale, part.y1 - top / self.scale),
        )


@dataclass(frozen=True)
class EvalTransform:
    """The whole picture, scaled so that its longer side is that of the canvas, and centred. Small ones grow."""

    canvas: int
    """Side in pixels."""

    def __call__(self, image: Image.Image, box: Box, sentence: str, generator: random.Random | None = None) -> View:
        """``image`` RGB, ``box`` in its pixels. ``generator`` is not used: nothing is random."""
        placement = Placement.fit(_whole(image), self.canvas, self.canvas)
        return placement.view(placement.resample(image), box, sentence)


@dataclass(frozen=True)
class TrainTransform:
    """Augmentation as TransVG trains (mirror, size crop, random scale, colours, blur), and then the canvas.

    A view depends on its arguments and the state of ``generator`` alone. Colours and blur are changed after
    resampling, where there are fewer pixels. Lengths are TransVG's at a canvas of 640 and scale with it.
    """

    canvas: int
    """Side in pixels."""
    flip: bool = True
    """Mirror every second sample, left and right in its sentence too."""
    crop: float = 0.5
    """Probability of a crop, see ``crop.random_crop``."""
    colour: float = 0.8
    """Probability of a change of colours by up to ``strength`` and ``hue``, see ``colours.jitter``."""
    strength: float = 0.4
    hue: float = 0.0
    blurred: float = 0.5
    """Probability of blur, with a standard deviation of up to 2 pixels."""
    translate: bool = False
    """Anywhere on the canvas instead of in its middle."""

    def __call__(self, image: Image.Image, box: Box, sentence: str, generator: random.Random) -> View:
        """``image`` RGB, ``box`` in its pixels, with an area."""
        unit = self.canvas / 640
        if self.flip and generator.random() < 0.5:
            image, box, sentence = mirrored(image, box, sentence)
        part = _whole(image)
        if generator.random() < self.crop:
            # The crop's sides are drawn at a size at which the picture's shorter side is so many pixels long.
            enlarged = generator.choice((400, 500, 600)) / min(image.size)
            part = random_crop(image.size, box, (384 / enlarged, 600 / enlarged), generator)
        longer = max(1, round(unit * generator.choice(range(448, 641, 32))))
        place = (generator.random(), generator.random()) if self.translate else (0.5, 0.5)
        placement = Placement.fit(part, self.canvas, longer, place)
        picture = placement.resample(image)
        if generator.random() < self.colour:
            picture = jitter(picture, self.strength, self.hue, generator)
        if generator.random() < self.blurred:
            picture = blur(picture, (0.1 * unit, 2 * unit), generator)
        return placement.view(picture, box, sentence)


def mirrored(image: Image.Image, box: Box, sentence: str) -> tuple[Image.Image, Box, str]:
    """Left and right exchanged in all three."""
    return ImageOps.mirror(image), Box(image.width - box.x2, box.y1, image.width - box.x1, box.y2), mirror(sentence)


def _whole(image: Image.Image) -> Box:
    return Box(0.0, 0.0, float(image.width), float(image.height))
