"""Position embeddings for another image size or text length, as open_clip resizes them.

Both are a product with a matrix of filter weights for each axis, built here in float64: PyTorch's
`F.interpolate` with `align_corners=False`, bicubic with `antialias=True` for images, linear
without it for texts. I, J and P count the new rows, columns and positions.
"""

import math

import numpy as np
from jaxtyping import Float

from clip_jax.errors import UserError


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
      new_grid: the height and width wanted.
      prefix_tokens: rows that are no patches.

    Returns:
      The rows of the new grid behind the same prefix, of the same type.
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
    """Weights [new, old]: Keys' cubic with a = -1/2, widened when there are fewer new points."""
    scale = old / new
    width = max(scale, 1.0)
    centres_P1 = ((np.arange(new) + 0.5) * scale)[:, None]
    x_PL = np.abs(np.arange(old) + 0.5 - centres_P1) / width
    near_PL = (1.5 * x_PL - 2.5) * x_PL**2 + 1
    far_PL = ((-0.5 * x_PL + 2.5) * x_PL - 4) * x_PL + 2
    weights_PL = np.where(x_PL < 1, near_PL, np.where(x_PL < 2, far_PL, 0))
    return weights_PL / weights_PL.sum(1, keepdims=True)


def _linear(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of the two nearest points; beyond the first and last, theirs alone."""
    at_P = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
    return np.maximum(1 - np.abs(at_P[:, None] - np.arange(old)), 0)
