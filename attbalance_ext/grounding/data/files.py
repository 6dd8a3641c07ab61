"""A split of a data set in files: RefCOCO and its like, or one's own, in any of the three formats."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from zlib import crc32

from PIL import Image

from attbalance_ext.grounding.errors import UserError

from .annotations import Annotation, Box
from .images import image_size, read_rgb
from .readers import Source, sources_of
from .wrong_boxes import WrongBoxes, treat

_log = logging.getLogger(__name__)


class FileDataset:
    """n sentences about pictures in files, which are read when they are asked for.

    The order is that of image name, box and sentence, so that the same content is the same data set whatever format
    it came in. Every box has an area and lies inside its image.
    """

    def __init__(
        self, name: str, split: str, annotations: Iterable[Annotation], wrong_boxes: WrongBoxes | None = None
    ) -> None:
        self.name = name
        self.split = split
        self.annotations = sorted(annotations, key=_place)
        self.sentences = [annotation.sentence for annotation in self.annotations]
        self.wrong_boxes = wrong_boxes or WrongBoxes()

    def __len__(self) -> int:
        return len(self.annotations)

    def pixels(self, index: int) -> Image.Image:
        """The picture of sentence ``index``, RGB, as stored: boxes are in stored pixels, so EXIF turns nothing.

        Raises ``UserError`` that names the file and the sentence where it cannot be read or is not of the size that its
        boxes are for.
        """
        path, size = self.annotations[index].image, self.annotations[index].size
        of = f"(for {self.sentences[index]!r}; 'attbalance data check ROOT --images' finds all such files)"
        try:
            pixels = read_rgb(path)
        except UserError as error:
            raise UserError(f"{error} {of}") from None
        if size not in (None, pixels.size):
            raise UserError(f"{path} is {pixels.size} pixels large; its annotations are for {size} {of}")
        return pixels

    def box(self, index: int) -> Box:
        """Corners in pixels of the picture."""
        return self.annotations[index].box

    def part(self, share: float) -> FileDataset:
        """About a ``share`` of the pictures with all their sentences, chosen by the images' names, so that larger parts
        hold smaller."""
        kept = [a for a in self.annotations if _number(a.image.name) < share * 2**32]
        return FileDataset(self.name, self.split, kept, self.wrong_boxes)

    def picture_key(self, index: int) -> Path:
        """Sentences about one picture share it."""
        return self.annotations[index].image


def _number(name: str) -> int:
    """Of 32 bits, the same on every machine. Bytes of a name that are no text are surrogates in Python."""
    return crc32(name.encode(errors="surrogatepass"))


def _place(annotation: Annotation) -> tuple[str, Box, str, str]:
    return annotation.image.name, annotation.box, annotation.sentence, str(annotation.image)


def open_dataset(name: str, split: str, *, root: Path, wrong_boxes: str = "skip") -> FileDataset:
    """Read the annotations of a split in whatever format lies under ``root``.

    Args:
        name: a published data set by any of its names (unc = refcoco, unc+ = refcoco+, gref = refcocog-google,
            gref_umd = refcocog-umd, referit = refclef, flickr), or the name of one's own in JSON lines.
        split: train, val, test, testA, testB, trainval (train and val, if it has no file), or one's own.
        root: the folder. Split files are looked for before the refer API's, those before JSON lines.
        wrong_boxes: "skip", "repair" or "error", see ``wrong_boxes.treat``.

    Raises:
        UserError: something is missing, damaged or wrong. The message has the exact path.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"root: there is no folder {root}")
    source = _source(name, split, root)
    parts = [split] if split in source.splits() else ["train", "val"]
    read = [annotation for part in parts for annotation in source.read(part)]
    if not read:
        raise UserError(f"{source.expected(split)} holds no annotation of {name} {split}")
    kept, found = treat(_with_sizes(read), _size, wrong_boxes)
    if found.total:
        _log.warning("%s %s: %s", name, split, found)
    return FileDataset(name, split, kept, found)


def _source(name: str, split: str, root: Path) -> Source:
    """The first format in which the split lies under ``root``."""
    sources = sources_of(name, root)
    for source in sources:
        here = set(source.splits())
        if split in here or (split == "trainval" and here >= {"train", "val"}):
            return source
    wanted = " or ".join(str(source.expected(split)) for source in sources)
    there = [f"{', '.join(found)} ({source.format})" for source in sources if (found := source.splits())]
    raise UserError(f"no split {split!r} of {name!r}: expected {wanted}; there is {'; '.join(there) or 'none'}")


def _with_sizes(annotations: list[Annotation]) -> list[Annotation]:
    """Fill in the sizes of the images, from their headers where the format does not know them.

    Raises ``UserError`` where an image is missing or its header cannot be read.
    """
    images = {annotation.image: annotation.size for annotation in annotations}
    missing = [path for path in images if not is_file(path)]
    if missing:
        of = next(annotation.sentence for annotation in annotations if annotation.image == missing[0])
        raise UserError(f"{len(missing)} of {len(images)} images are missing, the first is {missing[0]} (for {of!r})")
    sizes = {path: size or image_size(path) for path, size in images.items()}
    return [a if a.size else replace(a, size=sizes[a.image]) for a in annotations]


def is_file(path: Path) -> bool:
    """Whether an image lies at ``path``. A folder that may not be looked into is a ``UserError``."""
    try:
        return path.is_file()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _size(annotation: Annotation) -> tuple[int, int]:
    if annotation.size is None:
        raise ValueError(f"{annotation.image}: its size was never read")
    return annotation.size
