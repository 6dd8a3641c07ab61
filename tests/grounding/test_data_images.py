"""Reading an image file: the right greys, the formats that are taken, and one kind of error for whatever is wrong."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile
from PIL.TiffImagePlugin import SAMPLEFORMAT

from attbalance_ext.grounding.data.images import FORMATS, image_size, read_rgb
from attbalance_ext.grounding.errors import UserError

RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def grey(image: Image.Image) -> Any:
    red, green, blue = np.moveaxis(np.asarray(image), 2, 0)
    assert np.array_equal(red, green)
    assert np.array_equal(red, blue)
    return red


@pytest.mark.parametrize("suffix", ["png", "tif", "jp2", "pgm"])
def test_16_bit_greys_are_scaled(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "pgm":  # not every version of Pillow writes it
        path.write_bytes(b"P5 256 256 65535\n" + RAMP.astype(">u2").tobytes())
    else:
        Image.fromarray(RAMP).save(path)
    assert np.array_equal(grey(read_rgb(path)), np.rint(RAMP / 257))
    assert image_size(path) == (256, 256)


def test_greys_of_the_other_byte_order_and_of_older_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RAMP.astype(">u2")).save(tmp_path / "a.tif")
    assert np.array_equal(grey(read_rgb(tmp_path / "a.tif")), np.rint(RAMP / 257))
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        older = image.convert("I")
    older.format = "PNG"  # what Pillow 10 opens it as
    monkeypatch.setattr(Image, "open", lambda *_, **__: nullcontext(older))
    assert np.array_equal(grey(read_rgb(tmp_path / "a.png")), np.rint(RAMP / 257))


CHANGES = {
    "white is 0": (b"\x06\x01\x03\x00\x01\x00\x00\x00\x01", b"\x06\x01\x03\x00\x01\x00\x00\x00\x00"),
    "12 bits": (b"\x02\x01\x03\x00\x01\x00\x00\x00\x10", b"\x02\x01\x03\x00\x01\x00\x00\x00\x0c"),
}
"""Of a TIFF's tags: number, kind, how many values, value."""


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.float32, *CHANGES])
def test_greys_without_a_known_white_are_refused(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "a.tif"
    if kind in CHANGES:
        Image.fromarray(RAMP).save(path)
        content = path.read_bytes()
        path.write_bytes(content.replace(*CHANGES[kind]))
        assert path.read_bytes() != content
    elif kind is np.int16:
        Image.fromarray(RAMP).save(path, tiffinfo={SAMPLEFORMAT: 2})
    else:
        Image.fromarray((RAMP / 65535).astype(kind)).save(path)
    with pytest.raises(UserError, match=r"a\.tif cannot be read as an image: its grey values are neither of 8 nor"):
        read_rgb(path)


def test_what_is_transparent_shows_the_colour_in_the_file(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "a.png")
    assert read_rgb(tmp_path / "a.png").getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_read_whatever_its_name_and_cut_short_is_refused(tmp_path: Path, format: str) -> None:
    Image.init()
    if format not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {format}")
    path = tmp_path / "a.jpg"
    Image.effect_noise((64, 48), 50).convert("RGB").save(path, format)
    assert read_rgb(path).size == image_size(path) == (64, 48)
    assert read_rgb(path).mode == "RGB"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])
    with pytest.raises(UserError, match=r"a\.jpg cannot be read as an image: "):
        read_rgb(path)


def test_several_views_in_one_jpeg(tmp_path: Path) -> None:
    view = Image.new("RGB", (64, 48), (200, 30, 60))
    view.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48))])
    assert read_rgb(tmp_path / "a.jpg").getpixel((0, 0)) == pytest.approx((200, 30, 60), abs=3)


def test_postscript_is_no_image_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof, program = tmp_path / "proof", tmp_path / "gs"
    program.write_text(f"#!/bin/sh\necho $0 >> '{proof}'\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None, raising=False)  # where it was found before
    path = tmp_path / "a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n%%EndComments\n(x) print\n%%EOF\n")
    wanted = "JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM, AVIF, JPEG2000"
    says = f"{path} cannot be read as an image: cannot identify image file {str(path)!r}; it is to be {wanted}"
    for read in (image_size, read_rgb):
        with pytest.raises(UserError) as raised:
            read(path)
        assert str(raised.value) == says
    assert not proof.exists()
    with Image.open(path) as image, suppress(OSError):
        image.load()
    assert proof.exists(), "Pillow alone would have asked it"


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, NotImplementedError, AttributeError, KeyError])
def test_whatever_a_decoder_raises_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path)

    def broken(*_: object, **__: object) -> None:
        raise error

    for target, name, read in ((ImageFile.ImageFile, "load", read_rgb), (Image, "open", image_size)):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, broken)
            with pytest.raises(UserError) as raised:
                read(path)
        assert str(raised.value) == f"{path} cannot be read as an image: {error.__name__}"


def test_what_a_decoder_says_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("decoder:\n  no frame")

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(UserError, match=r"as an image: decoder:   no frame$"):
        image_size(tmp_path / "a.png")
