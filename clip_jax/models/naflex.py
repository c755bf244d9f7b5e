"""SigLIP 2's image tower for images of any shape, NaFlex (Tschannen et al. 2025, section 2.4).

An image is resized to a grid of patches that keeps nearly its own proportions, its patches are
filled up to one number, and those that fill are hidden. The grid is data: the programs depend on
the number of images and of patches alone.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from clip_jax.errors import UserError, check_choice
from clip_jax.models.block_form import BlockForm
from clip_jax.models.execution import DEFAULT_EXEC_CONFIG, ExecConfig
from clip_jax.models.formed_block import BlockInputs
from clip_jax.models.layers import (
    ACTIVATIONS,
    BlockConfig,
    LayerNorm,
    normal,
    timm_block_init,
)
from clip_jax.models.map_head import MAPHead
from clip_jax.models.sizes import check_sizes
from clip_jax.models.transformer import Transformer
from clip_jax.models.vit import PatchProjection


class ImagePatches(NamedTuple):
    """Images of several shapes as patches; P values are the pixels of one, row by row, RGB.

    Attributes:
      patches: uint8, or floats that are normalized; those of an image lie row by row, and
        behind them what fills up to L.
      mask: True for an image's own patches.
      grid: rows and columns of each image's patches.
    """

    patches: Num[Array | np.ndarray, "B L P"]
    mask: Bool[Array | np.ndarray, "B L"]
    grid: Int[Array | np.ndarray, "B 2"]


@dataclasses.dataclass(frozen=True)
class NaFlexConfig:
    """The sizes of an image transformer that takes grids of any shape.

    Attributes:
      image_size: side of the square image whose patches have the positions as they were learned,
        pixels; they are interpolated to each image's own grid.
      patch_size: side of a square patch, pixels.
      max_patches: how many patches an image is resized to, at most, where nothing else is said.
      width, layers, heads: of the transformer.
      mlp_ratio: hidden features of the MLP over the width.
      activation: of the MLPs, a name in `layers.ACTIVATIONS`.
      norm_eps: of the layer norms.
    """

    image_size: int
    patch_size: int
    max_patches: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_sizes(self, "vision")
        check_choice("vision.activation", self.activation, ACTIVATIONS)
        if min(self.patch_size, self.max_patches) < 1 or self.image_size < self.patch_size:
            raise UserError(
                "vision.patch_size and max_patches must be at least 1, and fit the image"
            )

    @property
    def grid_size(self) -> int:
        """Return the number of patches along a side of that square."""
        return self.image_size // self.patch_size

    @property
    def project(self) -> bool:
        """Return False: the pooled row is in the shared space."""
        return False

    @property
    def mlp_width(self) -> int:
        """Return the number of hidden features of an MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def block(self) -> BlockConfig:
        """Return the config of the blocks and of the MAP head."""
        init = timm_block_init()
        return BlockConfig(
            self.heads, self.mlp_width, self.activation, self.norm_eps, init, form=BlockForm()
        )


def grid_positions(
    table_LD: Float[Array, "L D"], grid_B2: Int[Array, "B 2"], length: int
) -> Float[Array, "B l D"]:
    """Return the positions of each image's patches, interpolated to its own grid, float32.

    As `torch.nn.functional.interpolate` does with mode "bilinear" and `antialias=True`: a triangle
    around each patch's place in the learned square, wider where the grid is smaller than that.
    The weights are computed from the grid, so one program serves all. Rows behind an image's
    patches hold numbers that nothing reads.

    Args:
      table_LD: the learned positions of a square, row by row.
      grid_B2: rows and columns of each image.
      length: the number of patches, those that fill included.
    """
    side = round(table_LD.shape[0] ** 0.5)
    grid_B2 = jnp.maximum(grid_B2, 1)
    number_L = jnp.arange(length)
    rows_BL = number_L // grid_B2[:, 1:]
    place_BL2 = jnp.stack([rows_BL, number_L - rows_BL * grid_B2[:, 1:]], axis=-1)
    step_B12 = side / grid_B2[:, None].astype(jnp.float32)
    centre_BL2 = (place_BL2.astype(jnp.float32) + 0.5) * step_B12 - 0.5
    distance_BL2S = jnp.abs(jnp.arange(side) - centre_BL2[..., None])
    weights_BL2S = jnp.maximum(1 - distance_BL2S / jnp.maximum(step_B12, 1)[..., None], 0)
    # What fills may lie beyond the square, where all weights are zero.
    total_BL21 = jnp.maximum(jnp.sum(weights_BL2S, axis=-1, keepdims=True), 1e-6)
    weights_BL2S = weights_BL2S / total_BL21
    both_BLSS = weights_BL2S[:, :, 0, :, None] * weights_BL2S[:, :, 1, None, :]
    flat_BLL = both_BLSS.reshape(*both_BLSS.shape[:2], side * side)
    return jnp.matmul(flat_BLL, table_LD.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def canvas_patches(canvas_BRPC: Any) -> ImagePatches:
    """Return what the rows of `data.patches.image_canvas` hold, NumPy's or JAX's."""
    batch, rows, size, channels = canvas_BRPC.shape
    blocks_BLP = canvas_BRPC.reshape(batch, rows // size, size * size * channels)
    low_high_B4 = blocks_BLP[:, -1, :4].astype(np.int32)
    grid_B2 = low_high_B4[:, ::2] + 256 * low_high_B4[:, 1::2]
    length = rows // size - 1
    return ImagePatches(blocks_BLP[:, :-1], own_patches(grid_B2, length), grid_B2)


def own_patches(grid_B2: Any, length: int) -> Any:
    """Return the mask of grids whose patches are filled up to `length`."""
    return np.arange(length) < grid_B2[:, :1] * grid_B2[:, 1:]


def whole_images(images_BHWC: Float[Array, "B H W 3"], size: int) -> ImagePatches:
    """Return the patches of images of one shape, none of which fills."""
    batch, height, width, channels = images_BHWC.shape
    rows, columns = height // size, width // size
    x = images_BHWC[:, : rows * size, : columns * size]
    x = x.reshape(batch, rows, size, columns, size, channels).transpose(0, 1, 3, 2, 4, 5)
    grid_B2 = jnp.broadcast_to(jnp.array([rows, columns]), (batch, 2))
    patches_BLP = x.reshape(batch, rows * columns, size * size * channels)
    return ImagePatches(patches_BLP, jnp.ones((batch, rows * columns), bool), grid_B2)


class NaFlexTransformer(nn.Module):
    """The image tower: patches, positions of each image's grid, blocks, attention pool."""

    config: NaFlexConfig
    embed_dim: int
    exec_config: ExecConfig = DEFAULT_EXEC_CONFIG

    @nn.compact
    def __call__(
        self,
        images: ImagePatches | Float[Array, "B H W 3"],
        train: bool = False,
        valid_B: Bool[Array, " B"] | None = None,
        patch_ids_Bl: Int[Array, "B l"] | None = None,
    ) -> Float[Array, "B D"]:
        """Return features of normalized patches, or of images of one shape; not of unit length.

        `train` and `valid_B` change nothing: they are of towers with batch norm.
        """
        del train, valid_B
        if patch_ids_Bl is not None:
            raise UserError("SigLIP 2 NaFlex sees all patches of an image: drop none of them")
        c = self.config
        if not isinstance(images, ImagePatches):
            images = whole_images(images, c.patch_size)
        patches_BLP, mask_BL, grid_B2 = images
        batch, length, _ = patches_BLP.shape
        # One below another they are an image of one column.
        column_BHWC = jnp.asarray(patches_BLP).reshape(batch, -1, c.patch_size, 3)
        dtype = self.exec_config.dtype
        x_BLD = PatchProjection(c.width, c.patch_size, True, dtype, name="conv1")(column_BHWC)
        shape = (c.grid_size**2, c.width)
        table_LD = self.param("positional_embedding", normal(c.width**-0.5), shape)
        positions_BLD = grid_positions(table_LD, jnp.asarray(grid_B2), length)
        x_BLD = x_BLD + positions_BLD.astype(x_BLD.dtype)
        transformer = Transformer(c.layers, c.block, self.exec_config, name="transformer")
        x_BLD = transformer(x_BLD, inputs=BlockInputs(seen_BL=jnp.asarray(mask_BL)))
        x_BLD = LayerNorm(c.norm_eps, name="ln_post")(x_BLD)
        own_B = jnp.sum(jnp.asarray(mask_BL), axis=1, dtype=jnp.int32)
        return MAPHead(c.block, self.exec_config, name="attn_pool")(x_BLD, own_B)
