"""Prepare images inside a program as `data.images.eval_transform` does on the host.

The sizes of the images may be symbolic: a program that is compiled for one of them holds it.
Pillow resizes one side and then the other, each a product with a matrix of weights, and rounds to
whole levels after each. Which comes first is Pillow 13's rule: the width, but for images whose
height shrinks by more than twice as many pixels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from clip_jax.data.images import Interpolation, Preprocess, ResizeMode

Side = Int[Array, ""]
"""A side of an image in pixels, known when the program is compiled for its size."""


def prepare_images(
    images_BHWC: UInt8[Array, "B H W 3"], image_size: int, preprocess: Preprocess
) -> UInt8[Array, "B n n 3"]:
    """Return RGB images of any size as the squares that the model sees.

    Equal to `eval_transform` but for a level where a sum of float32 falls on the other side of a
    half.
    """
    height, width = (jnp.asarray(side).astype(jnp.int32) for side in images_BHWC.shape[1:3])
    new_height, new_width = fitted_sides(height, width, image_size, preprocess.resize_mode)
    sides = ((height, new_height, images_BHWC.shape[1]), (width, new_width, images_BHWC.shape[2]))
    weights, inside = [], []
    for side, new_side, length in sides:
        pixel_n = jnp.arange(image_size) + crop_offset(new_side, image_size)
        weights.append(resize_weights(pixel_n, length, side, new_side, preprocess.interpolation))
        inside.append((pixel_n >= 0) & (pixel_n < new_side))
    by_row, by_column = weights
    x = jax.lax.cond(
        (height > new_height) & (height - new_height > 2 * (width - new_width)),
        lambda x: _fit_width(_fit_height(x, by_row), by_column),
        lambda x: _fit_height(_fit_width(x, by_column), by_row),
        images_BHWC.astype(jnp.float32),
    )
    return _filled(x.astype(jnp.uint8), inside[0], inside[1], preprocess.fill)


def _fit_height(x_BHWC: jax.Array, weights_nH: jax.Array) -> jax.Array:
    return _levels(jnp.einsum("nH,BHWC->BnWC", weights_nH, x_BHWC, precision="highest"))


def _fit_width(x_BHWC: jax.Array, weights_nW: jax.Array) -> jax.Array:
    return _levels(jnp.einsum("nW,BHWC->BHnC", weights_nW, x_BHWC, precision="highest"))


def _levels(x: jax.Array) -> jax.Array:
    """Return whole levels, halves rounded up as Pillow does."""
    return jnp.clip(jnp.floor(x + 0.5), 0, 255)


def _filled(
    images_BnnC: UInt8[Array, "B n n 3"],
    row_inside_n: Bool[Array, " n"],
    column_inside_n: Bool[Array, " n"],
    fill: int,
) -> UInt8[Array, "B n n 3"]:
    """Return the images with padding where rows or columns lie outside of what was resized."""
    inside_nn = row_inside_n[:, None] & column_inside_n[None, :]
    return jnp.where(inside_nn[None, :, :, None], images_BnnC, jnp.uint8(fill))


def fitted_sides(height: Side, width: Side, image_size: int, mode: ResizeMode) -> tuple[Side, Side]:
    """Return height and width after the resize, as `data.images.fitted_size` has them."""
    if mode == "squash":
        return jnp.full_like(height, image_size), jnp.full_like(width, image_size)
    if mode == "shortest":
        short = jnp.minimum(height, width)
        return image_size * height // short, image_size * width // short
    long = jnp.maximum(height, width)
    return _rounded_ratio(image_size * height, long), _rounded_ratio(image_size * width, long)


def _rounded_ratio(numerator: Side, denominator: Side) -> Side:
    """Return the quotient rounded, halves to the even side, and at least 1."""
    whole, twice_rest = numerator // denominator, 2 * (numerator % denominator)
    half_up = (twice_rest == denominator) & (whole % 2 == 1)
    return jnp.maximum(1, whole + ((twice_rest > denominator) | half_up))


def crop_offset(side: Side, image_size: int) -> Side:
    """Return where the square begins in a side: below zero where the side is padded."""
    more = side - image_size
    cut = more // 2 + (more % 2) * (more // 2 % 2)  # round() takes halves to the even side
    return jnp.where(more >= 0, cut, -(-more // 2))


def resize_weights(
    pixel_n: Int[Array, " n"],
    length: Any,
    side: Side,
    new_side: Side,
    interpolation: Interpolation,
) -> Float[Array, "n H"]:
    """Return the weight of each pixel of a side in some pixels of the resized one.

    Args:
      pixel_n: numbers of pixels of the resized side.
      length, side: the side's length, as a dimension (symbolic or not) and as a value.
      new_side: the length after the resize.
      interpolation: the filter, which is as wide as a new pixel where the image gets smaller.
    """
    # Centers are (i + 1/2) side / new_side. Doubled, all but one fraction is a whole number, so
    # that float32 loses nothing in large images.
    odd_n = 2 * pixel_n + 1
    turns_n = odd_n * (side % new_side)
    whole_n = odd_n * (side // new_side) + turns_n // new_side
    fraction_n = (turns_n % new_side).astype(jnp.float32) / new_side
    steps_nH = 2 * jnp.arange(length) + 1 - whole_n[:, None]
    distance_nH = (steps_nH - fraction_n[:, None]) / 2
    weights_nH = _FILTERS[interpolation](jnp.abs(distance_nH) / jnp.maximum(side / new_side, 1))
    # A row of the padding may see no pixel; what it gives is replaced.
    total_n1 = jnp.sum(weights_nH, axis=1, keepdims=True)
    return weights_nH / jnp.where(total_n1 == 0, 1, total_n1)


def _triangle(x: jax.Array) -> jax.Array:
    return jnp.maximum(0, 1 - x)


def _cubic(x: jax.Array) -> jax.Array:
    """Return Keys' cubic with a = -1/2, Pillow's "bicubic"."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


_FILTERS = {"bicubic": _cubic, "bilinear": _triangle}
