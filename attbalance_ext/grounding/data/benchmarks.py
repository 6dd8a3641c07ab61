"""The published data sets: their names in each file format and where their files lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .names import UnknownData

_COCO_IMAGES = ("other/images/mscoco/images/train2014", "images/mscoco/images/train2014", "images/train2014")
_IMAGE_BASES = ("", "ln_data", "data")
_ANNOTATION_BASES = ("", "data", "ln_data")


@dataclass(frozen=True)
class Benchmark:
    """A data set. Its first name is that of its split files."""

    names: tuple[str, ...]
    refer: tuple[str, str] | None
    """The refer API's folder and who split it, where that format has it."""
    splits: tuple[str, ...]
    corners: bool
    """Whether split files hold [x1, y1, x2, y2]; else [x1, y1, width, height]."""
    images: tuple[str, ...]
    """Folders its images may lie in, the published one first."""

    @property
    def name(self) -> str:
        return self.names[0]

    def split_folders(self, root: Path) -> list[Path]:
        """Where the split files may be, the usual place first."""
        return [root / base / self.name for base in _ANNOTATION_BASES]

    def refer_folders(self, root: Path) -> list[Path]:
        """Where ``refs(<by>).p`` may be, the usual place first."""
        return [root / base / self.refer[0] for base in _ANNOTATION_BASES] if self.refer else []

    def image_folders(self, root: Path) -> list[Path]:
        """Where the images may be, the published place first."""
        return [root / base / folder for folder in self.images for base in _IMAGE_BASES]


BENCHMARKS = (
    Benchmark(("unc", "refcoco"), ("refcoco", "unc"), ("train", "val", "testA", "testB"), False, _COCO_IMAGES),
    Benchmark(("unc+", "refcoco+"), ("refcoco+", "unc"), ("train", "val", "testA", "testB"), False, _COCO_IMAGES),
    Benchmark(("gref", "refcocog-google"), ("refcocog", "google"), ("train", "val"), False, _COCO_IMAGES),
    Benchmark(("gref_umd", "refcocog-umd"), ("refcocog", "umd"), ("train", "val", "test"), False, _COCO_IMAGES),
    Benchmark(
        ("referit", "refclef"),
        ("refclef", "berkeley"),
        ("train", "val", "test"),
        True,
        ("referit/images", "images/saiapr_tc-12"),
    ),
    Benchmark(
        ("flickr",),
        None,
        ("train", "val", "test"),
        True,
        ("Flickr30k/flickr30k_images", "Flickr30k/flickr30k-images", "flickr30k_images"),
    ),
)


def find_benchmark(name: str) -> Benchmark | None:
    """The published data set of that name in any format, or None: then it is the user's own.

    Raises ``UnknownData`` for "refcocog", which is split in two ways.
    """
    if name == "refcocog":
        raise UnknownData("'refcocog' is split in two ways: say 'refcocog-umd' or 'refcocog-google'")
    return next((benchmark for benchmark in BENCHMARKS if name in benchmark.names), None)
