"""Random changes of a training batch on the device, as a function of the seed and the step.

The draws are arrays with a row an image, made for the whole batch at once; what uses them is pure.
So a micro-batch takes its rows of them, twice if need be, and no mesh changes what an image gets.

Brightness, contrast and saturation are as torchvision's `adjust_*` functions define them, always in
this order (torchvision's ColorJitter draws the order too).
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clip_jax.sections import DataSection, ModelSection
from clip_jax.typing import Images

# ITU-R 601-2 luma, as torchvision rounds it.
_LUMA = (0.2989, 0.587, 0.114)

ERASING_MODES = ("const", "rand", "pixel")
# timm's RandomErasing: the box's share of the area, the least of its aspects, tries to place it.
ERASED_AREA, ERASED_ASPECT, ERASING_TRIES = (0.02, 1 / 3), 0.3, 10
# Each use of a step's key has its own; the colors have the key itself.
_PATCHES, _ERASING, _PATHS, _TEXT_PATHS = 1, 2, 3, 4


@runtime_checkable
class DrawFn(Protocol):
    """The random numbers of one step."""

    def __call__(self, step: Int[Array, ""], batch_size: int) -> dict[str, jax.Array]:
        """Return numbers for every row of the batch, by name; what is off has no entry.

        colors_B3: float32, factors of brightness, contrast and saturation.
        patch_ids_Bl: int32, the patches that stay, in their order.
        erase_B: bool, whether a box of the image is erased.
        erase_box_BT4: float32 in 0..1, of each try: the box's area, aspect, top and left.
        erase_color_B3: float32, the color of the box.
        erase_key_B2: uint32, the key of the noise in the box.
        path_scale_BK2, text_path_scale_BK2: float32, factors of both branches of each block of a
          tower.
        """
        ...


def kept_patches(patches: int, patch_dropout: float) -> int:
    """Count the patches of an image that stay; one at least."""
    return max(1, int(patches * (1 - patch_dropout)))


def drop_path_rates(drop_path: float, layers: int) -> Float[Array, " K"]:
    """Return the rate at which each block's branches are dropped: linear from 0, as timm's."""
    return jnp.linspace(0, drop_path, layers)


def _path_scales(
    key: jax.Array, batch_size: int, drop_path: float, layers: int
) -> Float[Array, "B K 2"]:
    """Draw which branches are passed by; the others are larger by as much, in the mean."""
    keep_K1 = 1 - drop_path_rates(drop_path, layers)[:, None]
    return (jax.random.uniform(key, (batch_size, layers, 2)) < keep_K1) / keep_K1


def make_draws(
    model: ModelSection,
    data: DataSection,
    *,
    seed: int,
    patches: int,
    layers: int,
    text_layers: int,
) -> DrawFn:
    """Make the function that draws the random numbers of a run.

    Args:
      model: its `patch_dropout`, the share of the patches that is left out (at least one stays),
        and its `drop_path` and `text_drop_path`.
      data: its `color_jitter`, in 0..1: brightness, contrast and saturation change by that at most;
        and its `random_erasing`.
      seed: the run's; a step draws the same on any mesh and after a resume.
      patches: the number of patches of one image.
      layers, text_layers: the number of blocks of each tower.
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
            noise_BL = jax.random.uniform(jax.random.fold_in(key, _PATCHES), (batch_size, patches))
            _, patch_ids_Bl = jax.lax.top_k(noise_BL, kept)
            draws["patch_ids_Bl"] = jnp.sort(patch_ids_Bl, axis=1)
        if data.random_erasing:
            keys = jax.random.split(jax.random.fold_in(key, _ERASING), 3)
            draws["erase_B"] = jax.random.uniform(keys[0], (batch_size,)) < data.random_erasing
            draws["erase_box_BT4"] = jax.random.uniform(keys[1], (batch_size, ERASING_TRIES, 4))
            if data.erasing_mode == "rand":
                draws["erase_color_B3"] = jax.random.normal(keys[2], (batch_size, 3))
            elif data.erasing_mode == "pixel":
                draws["erase_key_B2"] = jax.random.key_data(jax.random.split(keys[2], batch_size))
        if model.drop_path:
            paths = jax.random.fold_in(key, _PATHS)
            draws["path_scale_BK2"] = _path_scales(paths, batch_size, model.drop_path, layers)
        if model.text_drop_path:
            paths, rate = jax.random.fold_in(key, _TEXT_PATHS), model.text_drop_path
            draws["text_path_scale_BK2"] = _path_scales(paths, batch_size, rate, text_layers)
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


def erased_boxes(
    erase_B: Bool[Array, " B"], box_BT4: Float[Array, "B T 4"], height: int, width: int
) -> Bool[Array, "B H W"]:
    """Return which pixels are erased: of the first try whose box is smaller than the image.

    As in timm's `RandomErasing`; a box that never fits erases nothing.
    """
    low, high = ERASED_AREA
    area_BT = (low + (high - low) * box_BT4[..., 0]) * (height * width)
    log_aspect = -jnp.log(ERASED_ASPECT)
    aspect_BT = jnp.exp(log_aspect * (2 * box_BT4[..., 1] - 1))
    h_BT = jnp.round(jnp.sqrt(area_BT * aspect_BT))
    w_BT = jnp.round(jnp.sqrt(area_BT / aspect_BT))
    fits_BT = (h_BT < height) & (w_BT < width)
    first_B1 = jnp.argmax(fits_BT, axis=1)[:, None]

    def of_first(x_BT: Array) -> Array:
        return jnp.take_along_axis(x_BT, first_B1, axis=1)

    h_B1, w_B1 = of_first(h_BT), of_first(w_BT)
    top_B1 = jnp.floor(of_first(box_BT4[..., 2]) * (height - h_B1 + 1))
    left_B1 = jnp.floor(of_first(box_BT4[..., 3]) * (width - w_B1 + 1))
    y_H, x_W = jnp.arange(height), jnp.arange(width)
    rows_BH = (y_H >= top_B1) & (y_H < top_B1 + h_B1)
    columns_BW = (x_W >= left_B1) & (x_W < left_B1 + w_B1)
    is_erased_B = erase_B & fits_BT.any(axis=1)
    return is_erased_B[:, None, None] & rows_BH[:, :, None] & columns_BW[:, None, :]


def erase_boxes(images_BHWC: Images, draws: Mapping[str, jax.Array]) -> Images:
    """Erase a box of each chosen image; the images are normalized, so that 0 is the mean color.

    `draws` are those of `DrawFn` for these images.
    """
    shape = images_BHWC.shape[1:]
    filled = jnp.zeros(())
    if "erase_color_B3" in draws:
        filled = draws["erase_color_B3"][:, None, None, :]
    elif "erase_key_B2" in draws:
        keys_B = jax.random.wrap_key_data(draws["erase_key_B2"])
        filled = jax.vmap(lambda key: jax.random.normal(key, shape))(keys_B)
    erased_BHW = erased_boxes(draws["erase_B"], draws["erase_box_BT4"], *shape[:2])
    return jnp.where(erased_BHW[..., None], filled, images_BHWC)
