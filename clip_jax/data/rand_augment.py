"""RandAugment (arXiv:1909.13719): operations drawn from a list, all of one strength.

List, magnitudes and meanings are those of torchvision's `RandAugment` on PIL images, without
interpolation and with black where nothing is; `tests/parity` holds the operations to the same
bytes. (PyTorch's magnitudes are float32, whose last digit depends on the machine.)
"""

import math
from collections.abc import Callable
from typing import NamedTuple, cast

from PIL import Image, ImageEnhance, ImageOps

from clip_jax.data.images import Chance

STRENGTHS = 31
"""Strengths that there are, 0 to 30."""

Apply = Callable[[Image.Image, float], Image.Image]


class Operation(NamedTuple):
    """An operation of the list.

    Attributes:
      apply: takes an image and a magnitude.
      first, last: the magnitude at strengths 0 and 30; of an image's side, where `of_side`.
      is_signed: the magnitude is negative half of the time.
      of_side: "width" or "height" where the magnitude is a share of that.
    """

    apply: Apply
    first: float = 0.0
    last: float = 0.0
    is_signed: bool = False
    of_side: str = ""


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=0
    )


def _angle(shear: float) -> float:
    # Through degrees and back: the rounding decides which pixel is the nearest.
    return math.radians(math.degrees(math.atan(shear)))


def _shear_x(image: Image.Image, magnitude: float) -> Image.Image:
    return _affine(image, (1.0, math.tan(_angle(magnitude)), 0.0, 0.0, 1.0, 0.0))


def _shear_y(image: Image.Image, magnitude: float) -> Image.Image:
    angle = _angle(magnitude)
    return _affine(image, (1.0, 0.0, 0.0, math.sin(angle) / math.cos(angle), 1.0, 0.0))


def _translate_x(image: Image.Image, magnitude: float) -> Image.Image:
    return _affine(image, (1.0, 0.0, -float(int(magnitude)), 0.0, 1.0, 0.0))


def _translate_y(image: Image.Image, magnitude: float) -> Image.Image:
    return _affine(image, (1.0, 0.0, 0.0, 0.0, 1.0, -float(int(magnitude))))


def _rotate(image: Image.Image, magnitude: float) -> Image.Image:
    return image.rotate(magnitude, Image.Resampling.NEAREST, fillcolor=0)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Apply:
    return lambda image, magnitude: kind(image).enhance(1.0 + magnitude)


OPERATIONS = {
    "identity": Operation(lambda image, _: image),
    "shear_x": Operation(_shear_x, 0.0, 0.3, is_signed=True),
    "shear_y": Operation(_shear_y, 0.0, 0.3, is_signed=True),
    "translate_x": Operation(_translate_x, 0.0, 150 / 331, is_signed=True, of_side="width"),
    "translate_y": Operation(_translate_y, 0.0, 150 / 331, is_signed=True, of_side="height"),
    "rotate": Operation(_rotate, 0.0, 30.0, is_signed=True),
    "brightness": Operation(_enhance(ImageEnhance.Brightness), 0.0, 0.9, is_signed=True),
    "color": Operation(_enhance(ImageEnhance.Color), 0.0, 0.9, is_signed=True),
    "contrast": Operation(_enhance(ImageEnhance.Contrast), 0.0, 0.9, is_signed=True),
    "sharpness": Operation(_enhance(ImageEnhance.Sharpness), 0.0, 0.9, is_signed=True),
    "posterize": Operation(lambda image, bits: ImageOps.posterize(image, round(bits)), 8.0, 4.0),
    # Its type is narrower than what it takes, and PyTorch's magnitudes are no integers.
    "solarize": Operation(cast(Apply, ImageOps.solarize), 255.0, 0.0),
    "autocontrast": Operation(lambda image, _: ImageOps.autocontrast(image)),
    "equalize": Operation(lambda image, _: ImageOps.equalize(image)),
}
"""By name, in the order of the draw."""
_NAMES = tuple(OPERATIONS)


def magnitude_of(name: str, strength: int, size: tuple[int, int]) -> float:
    """Return an operation's magnitude on an image of (width, height), without its sign."""
    operation = OPERATIONS[name]
    side = {"": 1, "width": size[0], "height": size[1]}[operation.of_side]
    first, last = operation.first * side, operation.last * side
    return first + (last - first) * strength / (STRENGTHS - 1)


def rand_augment(image: Image.Image, operations: int, strength: int, rng: Chance) -> Image.Image:
    """Apply so many operations of the list, one after the other; each takes two draws."""
    for _ in range(operations):
        name = _NAMES[int(rng.random() * len(_NAMES))]
        magnitude, is_negative = magnitude_of(name, strength, image.size), rng.random() < 0.5
        if OPERATIONS[name].is_signed and is_negative:
            magnitude = -magnitude
        image = OPERATIONS[name].apply(image, magnitude)
    return image
