"""A split in memory, as a trainer reads it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from ..console import messages
from .annotations import Box
from .attributes import VALUES
from .cache import cache_directory, load_or_create
from .generate import SCENES, Arrays, content_version, gather, generate
from .names import BuiltinName, UnknownData, check_split

SIZES = (64, 128)
"""Image sides in pixels."""


class Sample(NamedTuple):
    image: Tensor
    """(3, H, W) uint8, RGB."""
    sentence: str
    box: Tensor
    """(4,) float32 cxcywh in [0, 1]."""
    box_ratio: Tensor
    """() float32, box area / image area."""


class Objects(NamedTuple):
    """All objects of S scenes in K slots. Labels are positions in ``VALUES[kind]``, -1 in empty slots."""

    boxes: Tensor
    """(S, K, 4) float32 cxcywh in [0, 1], 0 in empty slots."""
    present: Tensor
    """(S, K) bool."""
    shape: Tensor
    """(S, K) int64, like the next three."""
    colour: Tensor
    size: Tensor
    texture: Tensor


class GroundingDataset:
    """Sentences about S scenes, n in all. Everything is in memory.

    ``images`` (S, 3, H, W) uint8; ``scene_index`` (n,) int64; ``boxes`` (n, 4) float32 cxcywh in [0, 1];
    ``sentences`` n strings; ``box_ratio`` (n,) float32, box area / image area.
    """

    def __init__(self, name: str, split: str, arrays: Arrays) -> None:
        self.name = name
        self.split = split
        self.images = torch.from_numpy(arrays["images"])
        self.scene_index = torch.from_numpy(arrays["scene_index"])
        self.boxes = torch.from_numpy(arrays["boxes"])
        self.box_ratio = self.boxes[:, 2] * self.boxes[:, 3]
        self.sentences: list[str] = sentences_of(arrays)
        self._object_boxes = torch.from_numpy(arrays["object_boxes"])
        self._object_labels = torch.from_numpy(arrays["object_labels"]).long()

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitem__(self, index: int) -> Sample:
        scene = self.scene_index[index]
        return Sample(self.images[scene], self.sentences[index], self.boxes[index], self.box_ratio[index])

    def batch(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, list[str], Tensor, Tensor]:
        """Samples ``indices`` (B,): images (B, 3, H, W), B sentences, boxes (B, 4), box_ratio (B,)."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        sentences = [self.sentences[i] for i in chosen.tolist()]
        return self.images[self.scene_index[chosen]], sentences, self.boxes[chosen], self.box_ratio[chosen]

    def pixels(self, index: int) -> Image.Image:
        """The picture of sentence ``index``, RGB."""
        return Image.fromarray(self.images[self.scene_index[index]].permute(1, 2, 0).numpy())

    def box(self, index: int) -> Box:
        """Corners in pixels, as ``export`` writes them."""
        return pixel_corners(self.boxes[index].tolist(), self.images.shape[-1])

    def picture_key(self, index: int) -> int:
        """The scene: sentences about one picture share it."""
        return int(self.scene_index[index])

    def part(self, share: float) -> GroundingDataset:
        """A ``share`` of the scenes, at least one: the first, so that larger parts hold smaller ones."""
        scenes = max(round(share * len(self.images)), 1)
        sentences = int((self.scene_index < scenes).sum())  # they come scene by scene
        part = copy(self)
        for name in ("images", "_object_boxes", "_object_labels"):
            setattr(part, name, getattr(self, name)[:scenes])
        for name in ("scene_index", "boxes", "box_ratio", "sentences"):
            setattr(part, name, getattr(self, name)[:sentences])
        return part

    @property
    def objects(self) -> Objects:
        """Boxes and attributes of every object, to pre-train a visual stem without language.

        Only the split "train" hands them out: what a stem learns from must not include the scenes it is
        evaluated on. Other splits raise ``ValueError``.
        """
        if self.split != "train":
            raise ValueError(f"objects: only the split 'train' has them, this is {self.split!r}")
        labels = dict(zip(VALUES, self._object_labels.unbind(-1), strict=True))
        return Objects(self._object_boxes, self._object_labels[..., 0] >= 0, **labels)


def load_dataset(
    name: str, split: str, *, cache: Path | None = None, size: int = 64, progress: bool = True
) -> GroundingDataset:
    """Load a split of a built-in data set, generating it first if it is not in the cache.

    Args:
        name: "builtin:refcoco", "builtin:refcoco+", "builtin:refcocog" or "builtin:referit", each also with
            "-hard": more objects, most of them one attribute away from another.
        split: "train", "val", "test", or "test_novel": every target there has a combination of shape, colour,
            size and texture that no object of the first three has. "fresh" and "fresh_novel" are two more of the last
            two kinds, for studies.
        cache: the directory for generated data; default ``$ATTBALANCE_CACHE`` or ``~/.cache/attbalance_ext``.
        size: side of the images in pixels, 64 or 128. Scenes and sentences are the same in both.
        progress: show a progress bar while generating.

    Raises:
        ValueError: no such name, split or size; the message says what exists.
    """
    parsed = BuiltinName.parse(name)
    return GroundingDataset(str(parsed), split, load_arrays(parsed, split, cache=cache, size=size, progress=progress))


def load_arrays(
    name: BuiltinName, split: str, *, cache: Path | None = None, size: int = 64, progress: bool = True
) -> Arrays:
    """The arrays of a split as ``generate.gather`` documents them, from the cache or generated."""
    check_split(split)
    if size not in SIZES:
        raise UnknownData(f"size: images are {' or '.join(map(str, SIZES))} pixels wide, not {size}")
    scenes = SCENES[split]

    def create() -> Arrays:
        parts = track(
            generate(name, split, size, scenes),
            description=f"Generating {name} {split}",
            total=scenes,
            console=messages(),
            disable=not progress,
        )
        return gather(list(parts))

    stem = f"builtin-{name.flavour}{'-hard' if name.hard else ''}"
    file = f"{stem}-{split}-{scenes}x{size}-{content_version()}.npz"
    return load_or_create(cache_directory(cache) / file, create)


def pixel_corners(box: Sequence[float], size: int) -> Box:
    """A cxcywh box in [0, 1] of a square image as corners in its pixels, in float64."""
    cx, cy, width, height = (float(value) * size for value in box)
    return Box(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)


def sentences_of(arrays: Arrays) -> list[str]:
    """The sentences, in order."""
    return arrays["text"].tobytes().decode().splitlines()
