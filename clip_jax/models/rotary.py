"""Rotary positions in two dimensions (Su et al. 2021, arXiv:2104.09864; for images as in EVA-02).

Half of a head's features turn with a patch's place along one axis, half along the other, two
neighboring features together; the token before the patches does not turn. Cosines of two positions
depend on their distance alone.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from clip_jax.errors import check_choice
from clip_jax.models.sizes import check_sizes

AXES = ("rows first", "columns first")
TEMPERATURE = 10_000.0


@dataclasses.dataclass(frozen=True)
class RotaryConfig:
    """Which place a patch has, and which axis turns the first half of a head's features.

    Attributes:
      reference_grid: side of the grid that every other is stretched to (EVA-02's "ref_feat_shape").
      offset: place of the first patch, before stretching.
      axes: "rows first" or "columns first".
    """

    reference_grid: int
    offset: float = 0.0
    axes: str = "rows first"

    def __post_init__(self) -> None:
        check_sizes(self, "rotary")
        check_choice("rotary.axes", self.axes, AXES)


@functools.lru_cache(maxsize=8)
def rotary_tables(
    config: RotaryConfig, grid_size: int, head_size: int, prefix_tokens: int
) -> Float[np.ndarray, "2 L K"]:
    """Return the cosine and the sine by which each feature of each row turns, float32.

    Args:
      config: which place a patch has.
      grid_size: side of the grid of patches.
      head_size: features of a head, a multiple of 4.
      prefix_tokens: rows before the patches, which do not turn.
    """
    bands = head_size // 4
    # In float32 throughout, as the models were trained.
    exponents = np.arange(bands, dtype=np.float32) / np.float32(bands)
    frequencies = np.float32(1) / np.float32(TEMPERATURE) ** exponents
    places = np.arange(grid_size, dtype=np.float32) + np.float32(config.offset)
    places = places / np.float32(grid_size) * np.float32(config.reference_grid)
    rows, columns = np.meshgrid(places, places, indexing="ij")
    order = (rows, columns) if config.axes == "rows first" else (columns, rows)
    angles = np.stack(order, -1).reshape(-1, 2, 1) * frequencies
    angles_LK = np.repeat(angles.reshape(grid_size**2, -1), 2, axis=-1)
    angles_LK = np.pad(angles_LK, ((prefix_tokens, 0), (0, 0)))
    return np.stack([np.cos(angles_LK), np.sin(angles_LK)])


def rotate(x_BLNK: Float[Array, "B L N K"], tables: Float[Array, "2 *B L K"]) -> Array:
    """Turn pairs of neighboring features; `tables` are one for all sequences, or one for each."""
    cos, sin = tables[0][..., None, :], tables[1][..., None, :]
    x32 = x_BLNK.astype(jnp.float32)
    pairs = x32.reshape(*x32.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], -1).reshape(x32.shape)
    return (x32 * cos + turned * sin).astype(x_BLNK.dtype)
