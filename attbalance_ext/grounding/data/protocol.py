"""What a trainer reads a data set through, whether its pictures are in memory or in files."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from PIL import Image

from .annotations import Box


class Pictures(Protocol):
    """n sentences, each about a picture and a box in it."""

    name: str
    split: str
    sentences: list[str]

    def __len__(self) -> int: ...

    def pixels(self, index: int) -> Image.Image:
        """The picture of sentence ``index``, RGB."""

    def box(self, index: int) -> Box:
        """The true box of sentence ``index``: corners in pixels of the picture."""

    def picture_key(self, index: int) -> Hashable:
        """The same for sentences about one picture, and for no others."""
