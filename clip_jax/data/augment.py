"""Images for training: JPEG decoded no larger than a crop needs, then cropped, flipped, grayed.

A JPEG decoder can give k/8 of the size (k = 1..8) from fewer coefficients, for less work there and
much less in the resize behind it. k is the smallest with which the smallest crop that the settings
allow still has `image_size` pixels a side, so that no crop is ever enlarged because of it. It
depends on the image alone and not on the crop, so a decoded image can be kept between epochs.
Evaluation never comes here.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from clip_jax.data.images import Chance, costs_too_much, decode_image, random_resized_crop
from clip_jax.data.rand_augment import rand_augment
from clip_jax.sections import DataSection

T = TypeVar("T")


def smallest_crop(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[float, float]:
    """Return the least width and the least height of `images.crop_box`'s crops, before rounding.

    A crop of area s and aspect r is sqrt(s r) wide, and as it is no higher than the image, at
    least s / height wide; the centered crop that stands in when none fits has bounds of its own.
    """
    area = scale[0] * width * height
    least_width = max(math.sqrt(area * ratio[0]), area / height)
    least_height = max(math.sqrt(area / ratio[1]), area / width)
    least_width = min(least_width, float(width), height * ratio[1])
    return least_width, min(least_height, float(height), width / ratio[0])


def jpeg_scale(
    width: int,
    height: int,
    image_size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> int:
    """Return k of k/8: how large an image must be decoded; 8 where it must be whole."""
    crop = min(smallest_crop(width, height, scale, ratio))
    return min(8, max(1, math.ceil(8 * image_size / crop)))


def make_decode(image_size: int, config: DataSection) -> Callable[[bytes], Image.Image]:
    """Make `images.decode_image` with a JPEG in color reduced as far as the config's crops allow.

    Args:
      image_size: side of the crops, in pixels.
      config: `crop_scale`, `crop_ratio` and `max_pixels` are read.
    """
    scale, ratio, max_pixels = config.crop_scale, config.crop_ratio, config.max_pixels

    def reduced(data: bytes) -> np.ndarray | None:
        header = _if_readable(simplejpeg.decode_jpeg_header, data)
        if header is None:
            return None
        height, width, colors, _ = header
        pixels = width * height
        if colors != "YCbCr" or pixels > max_pixels or costs_too_much(data, pixels, max_pixels):
            return None
        k = jpeg_scale(width, height, image_size, scale, ratio)
        if k == 8:
            return None
        return _if_readable(
            simplejpeg.decode_jpeg,
            data,
            min_height=math.ceil(height * k / 8),
            min_width=math.ceil(width * k / 8),
            min_factor=1,
        )

    def decode(data: bytes) -> Image.Image:
        x_HWC = reduced(data) if data.startswith(b"\xff\xd8\xff") else None
        if x_HWC is None:
            # Pillow reads every kind, and says what is wrong with a damaged image.
            return decode_image(data, max_pixels=max_pixels)
        return Image.fromarray(x_HWC)

    return decode


def _if_readable(call: Callable[..., T], data: bytes, **options: Any) -> T | None:
    """Call simplejpeg; return None for bytes that are damaged or of a kind it does not know."""
    try:
        return call(data, **options)
    except ValueError:
        return None


def make_transform(
    image_size: int, config: DataSection
) -> Callable[[Image.Image, Chance], UInt8[np.ndarray, "H W 3"]]:
    """Make the training transform: a random crop, mirrored, gray and changed as the config says.

    The draws come in this order and are always made, so that one setting does not move another's.

    Args:
      image_size: side of the crops, in pixels.
      config: `crop_scale`, `crop_ratio`, `flip`, `grayscale`, and those of RandAugment are read.
    """
    operations, strength = config.rand_augment, config.rand_augment_magnitude

    def transform(image: Image.Image, rng: Chance) -> np.ndarray:
        x_HWC = random_resized_crop(image, image_size, rng, config.crop_scale, config.crop_ratio)
        mirrored, gray = rng.random() < config.flip, rng.random() < config.grayscale
        if mirrored:
            x_HWC = x_HWC[:, ::-1]
        if gray:
            x_HW = np.asarray(Image.fromarray(np.ascontiguousarray(x_HWC)).convert("L"))
            x_HWC = np.repeat(x_HW[..., None], 3, axis=-1)
        if operations:
            crop = Image.fromarray(np.ascontiguousarray(x_HWC))
            x_HWC = np.asarray(rand_augment(crop, operations, strength, rng))
        return x_HWC

    return transform
