"""Resize a checkpoint to another image size or text length, its positions as open_clip does.

Both are a product with a matrix of filter weights for each axis, built here in float64: PyTorch's
`F.interpolate` with `align_corners=False`, bicubic with `antialias=True` for images, linear
without it for texts. I, J and P count the new rows, columns and positions.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from clip_jax.errors import UserError
from clip_jax.models.convnet import ConvNetConfig
from clip_jax.models.naflex import NaFlexConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.pretrained.load import Checkpoint


def resize_checkpoint(
    checkpoint: Checkpoint,
    image_size: int | None,
    context_length: int | None,
    *,
    grow_text: bool = False,
) -> Checkpoint:
    """Return the checkpoint for images or captions of another size, its positions interpolated.

    As open_clip does it: bicubic over the grid of patches, linear over the text. Longer texts are
    for training on: a tower that is causal and read at the end token keeps the positions it has
    and gets more behind them.

    Args:
      checkpoint: as it was published.
      image_size, context_length: the new ones, in pixels and tokens; None keeps the checkpoint's.
      grow_text: texts may become longer.

    Raises:
      UserError: the size is not a multiple of the patch, or the text would grow.
    """
    vision, text = checkpoint.config.vision, checkpoint.config.text
    if image_size is not None and image_size != vision.image_size:
        checkpoint = _resize_images(checkpoint, image_size)
    if context_length is not None and context_length != text.context_length:
        if context_length < 2 or (context_length > text.context_length and not grow_text):
            raise UserError(
                f"context_length {context_length} is not between 2 and the checkpoint's "
                f"{text.context_length}"
            )
        checkpoint = _resize_texts(checkpoint, context_length)
    return checkpoint


def _resize_images(checkpoint: Checkpoint, image_size: int) -> Checkpoint:
    old = checkpoint.config.vision
    if isinstance(old, ConvNetConfig):
        raise UserError(f"{checkpoint.name} takes images of {old.image_size} pixels alone")
    if isinstance(old, NaFlexConfig):
        raise UserError(
            f"{checkpoint.name} takes images of any shape: leave image_size out, and give "
            "preprocess(images, max_patches=) the number of patches"
        )
    step = old.patch_size if isinstance(old, ViTConfig) else 32
    if image_size < step or (not isinstance(old, ViTConfig) and image_size % step):
        raise UserError(f"image_size {image_size} is not a multiple of {step} pixels")
    new = dataclasses.replace(old, image_size=image_size)
    path = f"visual/{'' if isinstance(old, ViTConfig) else 'attnpool/'}positional_embedding"
    config = dataclasses.replace(checkpoint.config, vision=new)
    if not isinstance(old, ViTConfig | ResNetConfig) or path not in checkpoint.arrays:
        # It has no positions.
        return dataclasses.replace(checkpoint, config=config)
    has_prefix = isinstance(old, ResNetConfig) or (old.class_token and old.class_position)
    prefix_tokens = int(has_prefix)
    read = checkpoint.arrays[path]
    grids = (old.grid_size,) * 2, (new.grid_size,) * 2
    resized = {path: lambda: resize_image_positions(read(), *grids, prefix_tokens)}
    return dataclasses.replace(checkpoint, config=config, arrays=checkpoint.arrays | resized)


def _resize_texts(checkpoint: Checkpoint, context_length: int) -> Checkpoint:
    old = checkpoint.config.text
    grows = context_length > old.context_length
    resize = extend_text_positions if grows and old.supports_trimming else resize_text_positions
    path = "text/positional_embedding"
    read = checkpoint.arrays[path]
    resized = {path: lambda: resize(read(), context_length)}
    text = dataclasses.replace(old, context_length=context_length)
    config = dataclasses.replace(checkpoint.config, text=text)
    return dataclasses.replace(checkpoint, config=config, arrays=checkpoint.arrays | resized)


def resize_image_positions(
    positions_LD: Float[np.ndarray, "L D"],
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    prefix_tokens: int = 1,
) -> Float[np.ndarray, "new D"]:
    """Resize the grid of patches; the tokens before it (the class token) stay as they are.

    Args:
      positions_LD: `prefix_tokens` rows, then the grid's, row by row.
      old_grid: its height and width in patches.
      new_grid: the new height and width in patches.
      prefix_tokens: rows that are no patches.

    Returns:
      The rows of the new grid behind the same prefix, of the same type.

    Raises:
      UserError: the rows are not those of the old grid.
    """
    rows = prefix_tokens + math.prod(old_grid)
    if len(positions_LD) != rows:
        raise UserError(
            f"position embedding has {len(positions_LD)} rows, and a grid of"
            f" {old_grid[0]} x {old_grid[1]} with {prefix_tokens} more tokens has {rows}:"
            " give the grid of the checkpoint"
        )
    if tuple(old_grid) == tuple(new_grid):
        return positions_LD
    prefix_LD, patches_LD = positions_LD[:prefix_tokens], positions_LD[prefix_tokens:]
    grid_HWD = patches_LD.reshape(*old_grid, -1).astype(np.float64)
    rows_IH, columns_JW = (_bicubic(o, n) for o, n in zip(old_grid, new_grid, strict=True))
    new_IJD = np.einsum("IH,JW,HWD->IJD", rows_IH, columns_JW, grid_HWD, optimize=True)
    new_LD = new_IJD.reshape(-1, new_IJD.shape[-1]).astype(positions_LD.dtype)
    return np.concatenate([prefix_LD, new_LD])


def resize_text_positions(
    positions_LD: Float[np.ndarray, "L D"], new_length: int
) -> Float[np.ndarray, "new D"]:
    """Resize the positions of a text tower to another context length."""
    if len(positions_LD) == new_length:
        return positions_LD
    weights_PL = _linear(len(positions_LD), new_length)
    return (weights_PL @ positions_LD.astype(np.float64)).astype(positions_LD.dtype)


def extend_text_positions(
    positions_LD: Float[np.ndarray, "L D"], new_length: int
) -> Float[np.ndarray, "new D"]:
    """Add positions behind the last one, which they repeat, for training on longer texts.

    For a tower that is causal and read at the end token: a text that fitted before has the very
    features it had, where interpolation would move every one of its tokens.
    """
    return np.pad(positions_LD, ((0, new_length - len(positions_LD)), (0, 0)), mode="edge")


def _bicubic(old: int, new: int) -> np.ndarray:
    """Return weights [new, old]: Keys' cubic, a = -1/2, widened for fewer new points."""
    scale = old / new
    width = max(scale, 1.0)
    centres_P1 = ((np.arange(new) + 0.5) * scale)[:, None]
    x_PL = np.abs(np.arange(old) + 0.5 - centres_P1) / width
    near_PL = (1.5 * x_PL - 2.5) * x_PL**2 + 1
    far_PL = ((-0.5 * x_PL + 2.5) * x_PL - 4) * x_PL + 2
    weights_PL = np.where(x_PL < 1, near_PL, np.where(x_PL < 2, far_PL, 0))
    return weights_PL / weights_PL.sum(1, keepdims=True)


def _linear(old: int, new: int) -> np.ndarray:
    """Return weights [new, old] of the two nearest points; beyond the ends, of the last alone."""
    position_P = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
    return np.maximum(1 - np.abs(position_P[:, None] - np.arange(old)), 0)
