"""Random changes of a training batch on the device, as a function of the seed and the step.

The draws are arrays with a row an image, made for the whole batch at once; what uses them is pure.
So a micro-batch takes its rows of them, twice if need be, and no mesh changes what an image gets.

Brightness, contrast and saturation are as torchvision's `adjust_*` functions define them, always in
this order (torchvision's ColorJitter draws the order too).
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clip_jax.sections import DataSection, ModelSection
from clip_jax.typing import Images

# ITU-R 601-2 luma, as torchvision rounds it.
_LUMA = (0.2989, 0.587, 0.114)


@runtime_checkable
class DrawFn(Protocol):
    """The random numbers of one step."""

    def __call__(self, step: Int[Array, ""], batch_size: int) -> dict[str, jax.Array]:
        """Return numbers for every row of the batch, by name; what is off has no entry.

        colors_B3: float32, factors of brightness, contrast and saturation.
        patch_ids_Bl: int32, the patches that stay, in their order.
        """
        ...


def kept_patches(patches: int, patch_dropout: float) -> int:
    """Count the patches of an image that stay; one at least."""
    return max(1, int(patches * (1 - patch_dropout)))


def make_draws(model: ModelSection, data: DataSection, *, seed: int, patches: int) -> DrawFn:
    """Make the function that draws the random numbers of a run.

    Args:
      model: its `patch_dropout`, the share of the patches that is left out; at least one stays.
      data: its `color_jitter`, in 0..1: brightness, contrast and saturation change by that at most.
      seed: the run's; a step draws the same on any mesh and after a resume.
      patches: the number of patches of one image.
    """
    color_jitter, patch_dropout = data.color_jitter, model.patch_dropout

    def draw(step: Int[Array, ""], batch_size: int) -> dict[str, jax.Array]:
        key = jax.random.fold_in(jax.random.key(seed), step)
        draws: dict[str, jax.Array] = {}
        if any(color_jitter):
            changes_B3 = jax.random.uniform(key, (batch_size, 3), minval=-1, maxval=1)
            draws["colors_B3"] = 1 + changes_B3 * jnp.array(color_jitter)
        if patch_dropout:
            kept = kept_patches(patches, patch_dropout)
            noise_BL = jax.random.uniform(jax.random.fold_in(key, 1), (batch_size, patches))
            _, patch_ids_Bl = jax.lax.top_k(noise_BL, kept)
            draws["patch_ids_Bl"] = jnp.sort(patch_ids_Bl, axis=1)
        return draws

    return draw


def adjust_colors(images_BHWC: Images, factors_B3: Float[Array, "B 3"]) -> Images:
    """Blend each image with black, with its mean gray, and with its own gray.

    Args:
      images_BHWC: values in 0..1.
      factors_B3: of brightness, contrast and saturation; 1 leaves an image as it is.
    """
    brightness, contrast, saturation = jnp.split(factors_B3[:, None, None, :], 3, axis=-1)
    x_BHWC = jnp.clip(images_BHWC * brightness, 0, 1)
    mean_B111 = jnp.mean(_gray(x_BHWC), axis=(1, 2), keepdims=True)
    x_BHWC = jnp.clip(mean_B111 + (x_BHWC - mean_B111) * contrast, 0, 1)
    gray_BHW1 = _gray(x_BHWC)
    return jnp.clip(gray_BHW1 + (x_BHWC - gray_BHW1) * saturation, 0, 1)


def _gray(images_BHWC: Images) -> Float[Array, "B H W 1"]:
    # Not a matrix product: an accelerator would round one.
    return jnp.sum(images_BHWC * jnp.array(_LUMA), axis=-1, keepdims=True)
