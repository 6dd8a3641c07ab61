"""Changes of colour and sharpness that leave every box where it is."""

from __future__ import annotations

import random

from PIL import Image, ImageEnhance, ImageFilter

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def jitter(image: Image.Image, strength: float, hue: float, generator: random.Random) -> Image.Image:
    """Scale brightness, contrast and saturation, in random order, by factors in [1 - strength, 1 + strength].

    ``hue``: largest turn of the colour circle, as a share of it; 0 leaves colours what they are called.
    """
    for enhancer in generator.sample(_ENHANCERS, len(_ENHANCERS)):
        image = enhancer(image).enhance(generator.uniform(max(0.0, 1 - strength), 1 + strength))
    if hue:
        image = turn_hue(image, generator.uniform(-hue, hue))
    return image


def turn_hue(image: Image.Image, share: float) -> Image.Image:
    """Turn every colour by ``share`` of the circle."""
    offset = round(share * 256)
    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point([(level + offset) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def blur(image: Image.Image, sigma: tuple[float, float], generator: random.Random) -> Image.Image:
    """Gaussian blur whose standard deviation in pixels is drawn from ``sigma``, (least, most)."""
    return image.filter(ImageFilter.GaussianBlur(generator.uniform(*sigma)))
