"""Colour changes of a training batch, on the device, as a function of the seed and the step.

Brightness, contrast and saturation as torchvision's `adjust_*` functions define them, always in
this order (torchvision's ColorJitter draws the order too).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clip_jax.typing import Images

ColorJitter = Callable[[Images, Int[Array, ""]], Images]
"""(images in 0..1, the step) -> images in 0..1."""

# ITU-R 601-2 luma, as torchvision rounds it.
_LUMA = (0.2989, 0.587, 0.114)


def adjust_colors(images_BHWC: Images, factors_B3: Float[Array, "B 3"]) -> Images:
    """Blend each picture with black, with its mean grey, and with its own grey.

    Args:
      images_BHWC: values in 0..1.
      factors_B3: of brightness, contrast and saturation; 1 leaves a picture as it is.
    """
    brightness, contrast, saturation = jnp.split(factors_B3[:, None, None, :], 3, axis=-1)
    x_BHWC = jnp.clip(images_BHWC * brightness, 0, 1)
    mean_B111 = jnp.mean(_grey(x_BHWC), axis=(1, 2), keepdims=True)
    x_BHWC = jnp.clip(mean_B111 + (x_BHWC - mean_B111) * contrast, 0, 1)
    grey_BHW1 = _grey(x_BHWC)
    return jnp.clip(grey_BHW1 + (x_BHWC - grey_BHW1) * saturation, 0, 1)


def _grey(images_BHWC: Images) -> Float[Array, "B H W 1"]:
    # Not a matrix product: an accelerator would round one.
    return jnp.sum(images_BHWC * jnp.array(_LUMA), axis=-1, keepdims=True)


def make_color_jitter(amounts: tuple[float, float, float], *, seed: int) -> ColorJitter:
    """Random factors within 1 - amount and 1 + amount, drawn anew for every picture and step.

    Args:
      amounts: of brightness, contrast and saturation, in 0..1; all 0 leaves every picture as it is.
      seed: the run's; a step draws the same on any mesh and after a resume.
    """
    if not any(amounts):
        return lambda images_BHWC, step: images_BHWC

    def color_jitter(images_BHWC: Images, step: Int[Array, ""]) -> Images:
        key = jax.random.fold_in(jax.random.key(seed), step)
        draws_B3 = jax.random.uniform(key, (images_BHWC.shape[0], 3), minval=-1, maxval=1)
        return adjust_colors(images_BHWC, 1 + draws_B3 * jnp.array(amounts))

    return color_jitter
