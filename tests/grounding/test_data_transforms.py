"""From a picture to a canvas: boxes stay on their objects, whatever is cropped, scaled, mirrored or recoloured."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from attbalance_ext.grounding.data import Box
from attbalance_ext.grounding.data.colours import blur, jitter, turn_hue
from attbalance_ext.grounding.data.crop import kept_share, random_crop
from attbalance_ext.grounding.data.flip import mirror
from attbalance_ext.grounding.data.transforms import FILL, EvalTransform, Placement, TrainTransform, View, mirrored

RED, BLACK = (255, 0, 0), (0, 0, 0)
GEOMETRY = {"colour": 0.0, "blurred": 0.0}


def picture(size: tuple[int, int], box: Box) -> Image.Image:
    """Black with a red rectangle, whose edges lie between pixels."""
    image = Image.new("RGB", size, BLACK)
    ImageDraw.Draw(image).rectangle((box.x1, box.y1, box.x2 - 1, box.y2 - 1), fill=RED)
    return image


@st.composite
def pictures(draw: st.DrawFn) -> tuple[tuple[int, int], Box]:
    """A size, and a box of whole pixels inside."""
    size = draw(st.tuples(st.integers(2, 300), st.integers(2, 300)))
    (x1, x2), (y1, y2) = (
        sorted(draw(st.lists(st.integers(0, side), min_size=2, max_size=2, unique=True))) for side in size
    )
    return size, Box(float(x1), float(y1), float(x2), float(y2))


def corners(view: View) -> Box:
    """The box in pixels of the canvas."""
    cx, cy, width, height = (view.box.double() * view.padding.shape[0]).tolist()
    return Box(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)


def check_view(view: View, canvas: int) -> None:
    assert (view.image.shape, view.image.dtype) == ((3, canvas, canvas), torch.uint8)
    assert (view.padding.shape, view.padding.dtype) == ((canvas, canvas), torch.bool)
    assert (view.box.shape, view.box.dtype) == ((4,), torch.float32)
    assert not view.padding.all()
    fill = torch.tensor(FILL, dtype=torch.uint8)
    assert (view.image.permute(1, 2, 0)[view.padding] == fill).all()
    rows, columns = ((~view.padding).any(dim) for dim in (1, 0))
    assert torch.equal(~view.padding, rows[:, None] & columns)  # a rectangle
    box = corners(view)
    assert 0 <= box.x1 < box.x2 <= canvas + 1e-3
    assert 0 <= box.y1 < box.y2 <= canvas + 1e-3
    assert 0 < view.box_ratio <= 1


def check_red_is_in_the_box(view: View) -> None:
    """Bilinear resampling smears an edge over a pixel of the canvas and one of the picture."""
    box, canvas = corners(view), view.padding.shape[0]
    smear = 1 + 1 / view.to_source[0]
    red = (view.image[0] > 127) & (view.image[1] < 64) & (view.image[2] < 64)
    y, x = torch.meshgrid(torch.arange(canvas) + 0.5, torch.arange(canvas) + 0.5, indexing="ij")
    outside = torch.stack([box.x1 - x, x - box.x2, box.y1 - y, y - box.y2]).amax(0)
    shown = ~view.padding
    assert not (red & (outside > smear)).any()
    assert (red | ~shown | (outside > -smear)).all()


@given(pictures(), st.integers(16, 200))
def test_evaluation_shows_everything_in_the_middle(case: tuple[tuple[int, int], Box], canvas: int) -> None:
    size, box = case
    image = picture(size, box)
    view = EvalTransform(canvas)(image, box, "a left man")
    check_view(view, canvas)
    check_red_is_in_the_box(view)
    assert view.sentence == "a left man"
    shown = ~view.padding
    rows, columns = int(shown.any(1).sum()), int(shown.any(0).sum())
    assert max(rows, columns) == canvas
    for hidden in (view.padding.all(1), view.padding.all(0)):
        leading = int(hidden.long().cumprod(0).sum())
        assert 0 <= int(hidden.sum()) - 2 * leading <= 1
    scale, dx, dy = view.to_source
    assert scale == pytest.approx(max(size) / canvas, rel=1e-12)
    back = [value * scale + shift for value, shift in zip(corners(view), (dx, dy, dx, dy), strict=True)]
    assert back == pytest.approx(box, abs=1e-3 * scale + 1e-4)
    area = (box.x2 - box.x1) * (box.y2 - box.y1)
    assert view.box_ratio == pytest.approx(area / (size[0] * size[1]))


def test_a_picture_of_the_canvas_size_is_shown_bit_for_bit() -> None:
    image = Image.effect_noise((64, 64), 60).convert("RGB")
    view = EvalTransform(64)(image, Box(8.0, 16.0, 24.0, 48.0), "x")
    assert np.array_equal(view.image.permute(1, 2, 0).numpy(), np.asarray(image))
    assert view.box.tolist() == [0.25, 0.5, 0.25, 0.5]
    assert not view.padding.any()
    assert view.to_source == (1.0, 0.0, 0.0)


def test_rounding_takes_no_pixel() -> None:
    """Of some numbers side * (canvas / side) is less than canvas."""
    losing = [(side, canvas) for canvas in range(64, 641) for side in range(1, 300) if side * (canvas / side) < canvas]
    assert len(losing) > 100
    for side, canvas in losing:
        assert Placement.fit(Box(0.0, 0.0, float(side), float(side)), canvas, canvas).size == (canvas, canvas)


@pytest.mark.parametrize("lying", [True, False])
def test_both_axes_have_the_same_scale(lying: bool) -> None:
    """101 rows at half the size are 50 and a half: the half is left out, nothing is stretched to fill a row."""
    ramp = np.repeat(2 * np.arange(101, dtype=np.uint8)[:, None, None], 200, axis=1).repeat(3, axis=2)
    image = Image.fromarray(ramp if lying else np.ascontiguousarray(ramp.transpose(1, 0, 2)))
    view = EvalTransform(100)(image, Box(0.0, 0.0, 1.0, 1.0), "x")
    pixels, padding = (view.image[0], view.padding) if lying else (view.image[0].T, view.padding.T)
    shown = pixels[~padding.all(1), 50].long()
    assert (shown[2:-2] - (4 * torch.arange(50) + 1)[2:-2]).abs().max() <= 1
    assert len(shown) == 50


def test_enlarged_letterbox() -> None:
    """A 64 x 48 picture on a canvas of 128: 128 x 96, with 16 rows above and below."""
    view = EvalTransform(128)(Image.new("RGB", (64, 48)), Box(0.0, 0.0, 64.0, 24.0), "x")
    assert view.padding[:16].all()
    assert view.padding[112:].all()
    assert not view.padding[16:112].any()
    assert corners(view) == (0, 16, 128, 64)
    assert (view.box_ratio, view.to_source) == (0.5, (0.5, 0.0, -8.0))


@settings(max_examples=200)
@given(pictures(), st.integers(0, 2**32), st.booleans(), st.sampled_from([64, 160]))
def test_training_views_keep_the_object(
    case: tuple[tuple[int, int], Box], seed: int, translate: bool, canvas: int
) -> None:
    size, box = case
    transform = TrainTransform(canvas, translate=translate, **GEOMETRY)
    view = transform(picture(size, box), box, "the left one", random.Random(seed))
    check_view(view, canvas)
    check_red_is_in_the_box(view)
    is_mirrored = view.sentence == "the right one"
    source = mirrored(picture(size, box), box, "")[1] if is_mirrored else box
    scale, dx, dy = view.to_source
    seen = Box(*(value * scale + shift for value, shift in zip(corners(view), (dx, dy, dx, dy), strict=True)))
    assert kept_share(source, seen) >= 0.5 - 1e-3
    assert kept_share(seen, source) >= 1 - 1e-3  # nothing but the object


@settings(max_examples=500)
@given(pictures(), st.floats(0.5, 400), st.floats(0, 400), st.integers(0, 2**32))
def test_a_crop_keeps_half_of_the_box(case: tuple[tuple[int, int], Box], least: float, more: float, seed: int) -> None:
    size, box = case
    crop = random_crop(size, box, (least, least + more), random.Random(seed))
    assert kept_share(box, crop) >= 0.5
    assert 0 <= crop.x1 < crop.x2 <= size[0]
    assert 0 <= crop.y1 < crop.y2 <= size[1]
    assert all(value == int(value) for value in crop)
    if crop != (0, 0, *size):
        for side, limit in ((crop.x2 - crop.x1, size[0]), (crop.y2 - crop.y1, size[1])):
            assert min(least, limit) - 1 <= side <= min(least + more, limit) + 1


def test_crops_do_crop_and_do_cut_boxes() -> None:
    box = Box(100.0, 100.0, 300.0, 300.0)
    crops = [random_crop((640, 480), box, (200, 400), random.Random(seed)) for seed in range(200)]
    shares = [kept_share(box, crop) for crop in crops]
    assert sum(crop == (0, 0, 640, 480) for crop in crops) < 20
    assert min(shares) < 0.7
    assert max(shares) == 1
    assert len(set(crops)) > 150


def test_a_view_follows_from_the_generator() -> None:
    image, box = Image.effect_noise((80, 60), 60).convert("RGB"), Box(10.0, 10.0, 50.0, 40.0)
    views = [TrainTransform(96)(image, box, "left", random.Random(seed)) for seed in (*range(40), 0)]
    assert torch.equal(views[0].image, views[-1].image)
    assert views[0].to_source == views[-1].to_source
    assert torch.equal(views[0].box, views[-1].box)
    assert all(not torch.equal(one.image, other.image) for one, other in pairwise(views))
    assert {view.sentence for view in views} == {"left", "right"}
    assert len({tuple(view.box.tolist()) for view in views}) > 20


def test_what_is_switched_off_does_not_happen() -> None:
    image, box = Image.effect_noise((80, 60), 60).convert("RGB"), Box(10.0, 10.0, 50.0, 40.0)
    transform = TrainTransform(96, flip=False, crop=0, **GEOMETRY)
    for seed in range(30):
        view = transform(image, box, "left", random.Random(seed))
        assert view.sentence == "left"
        assert view.box_ratio == pytest.approx(40 * 30 / (80 * 60))
        longer = int((~view.padding).any(0).sum())
        assert longer in {round(96 * share / 640) for share in range(448, 641, 32)}


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("man on the left", "man on the right"),
        ("Right man", "Left man"),
        ("LEFT! no, right.", "RIGHT! no, left."),
        ("leftmost of the left-hand ones", "rightmost of the right-hand ones"),
        ("Topleft dog, farright one", "Topright dog, farleft one"),
        ("the right's neighbour, left", "the left's neighbour, right"),
        ("righthand Leftside leftward rightwards lefty", "lefthand Rightside rightward leftwards righty"),
        ("lft guy, far RT", "rt guy, far LFT"),
        ("bright leftover uprights, alright: copyright", "bright leftover uprights, alright: copyright"),
        ("art start lift", "art start lift"),
        ("", ""),
        ("links/left/左", "links/right/左"),
    ],
)
def test_mirrored_sentences(sentence: str, expected: str) -> None:
    assert mirror(sentence) == expected
    assert mirror(expected) == sentence


@given(st.text(alphabet="lefrightLRT -'\n"))
def test_mirroring_twice_is_nothing(sentence: str) -> None:
    assert mirror(mirror(sentence)).lower() == sentence.lower()


def test_mirrored_pictures() -> None:
    box = Box(1.0, 2.0, 10.0, 20.0)
    image, seen, sentence = mirrored(picture((40, 30), box), box, "left")
    assert (seen, sentence) == ((30, 2, 39, 20), "right")
    assert np.array_equal(np.asarray(image), np.asarray(picture((40, 30), seen)))


def test_hue_turns_and_comes_back() -> None:
    image = picture((8, 8), Box(0.0, 0.0, 4.0, 8.0))
    assert turn_hue(image, 1 / 3).getpixel((0, 0)) == pytest.approx((0, 255, 0), abs=6)
    assert turn_hue(image, 1 / 3).getpixel((7, 0)) == BLACK
    assert turn_hue(turn_hue(image, 0.25), 0.75).getpixel((0, 0)) == pytest.approx(RED, abs=6)


def test_jitter_and_blur_change_values_not_places() -> None:
    image = picture((40, 40), Box(10.0, 10.0, 30.0, 30.0))
    brightest = {int(np.asarray(jitter(image, 0.4, 0.0, random.Random(seed))).max()) for seed in range(10)}
    assert len(brightest) > 5
    assert jitter(image, 0.0, 0.0, random.Random(1)).tobytes() == image.tobytes()
    soft = np.asarray(blur(image, (2.0, 2.0), random.Random(0)), dtype=float)[..., 0]
    y, x = np.mgrid[:40, :40]
    assert [(soft * x).sum() / soft.sum(), (soft * y).sum() / soft.sum()] == pytest.approx([19.5, 19.5], abs=0.05)
    assert 0 < soft[20, 8] < 128 < soft[20, 12] < 255
