"""An image file as RGB. Whatever is wrong with it, in whatever format, is a ``UserError`` of one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from attbalance_ext.grounding.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""What a file may be, whatever its name says. Pillow knows more, even PostScript, which it lets Ghostscript run."""


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels by the file's header; nothing is decoded."""
    with _opened(path) as image:
        return image.size


def read_rgb(path: Path) -> Image.Image:
    """The picture as stored: EXIF turns nothing.

    What is transparent shows the colour that the file has there, as it does to all who read images by
    ``convert("RGB")``, the published trainers among them.
    """
    with _opened(path) as image:
        if _is_16_bit_grey(image):
            # Pillow's own conversion cuts off at 255. The half is there because ``point`` drops the fraction.
            return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L").convert("RGB")
        if image.mode.partition(";")[0] in ("I", "F"):
            raise ValueError("its grey values are neither of 8 nor of 16 bits with black at 0, so white is not known")
        return image.convert("RGB")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        Image.init()
        formats = [name for name in FORMATS if name in Image.OPEN]  # older versions of Pillow have no AVIF
        with Image.open(path, formats=formats) as image:
            yield image
    except UnidentifiedImageError as error:
        raise UserError(f"{path} cannot be read as an image: {error}; it is to be {', '.join(FORMATS)}") from None
    except Exception as error:  # each decoder raises what it likes on a damaged file
        reason = " ".join(str(error).splitlines()) or type(error).__name__
        raise UserError(f"{path} cannot be read as an image: {reason}") from None


def _is_16_bit_grey(image: Image.Image) -> bool:
    """Whether its values are grey from 0, black, to 65535, white."""
    if isinstance(image, TiffImageFile):  # 12 bits, and values whose 0 is white, are left as they are stored
        tags = image.tag_v2
        sure = tags.get(BITSPERSAMPLE) == (16,) and tags.get(PHOTOMETRIC_INTERPRETATION) == 1
        return sure and image.mode.startswith("I;16")
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
