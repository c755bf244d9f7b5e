"""The Vision Transformer of CLIP (paper section 2.4; OpenAI `clip/model.py` VisionTransformer)."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from clip_jax.models.layers import LayerNorm, Transformer, normal, torch_uniform, vision_block_init


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of an image transformer.

    Attributes:
      image_size: side of the square input, pixels.
      patch_size: side of a square patch, pixels.
      width, layers, heads: of the transformer; a head is width / heads features wide.
      mlp_ratio: hidden features of the MLP over the width.
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0

    @property
    def grid_size(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)


class VisionTransformer(nn.Module):
    """Images to features: patches, class token, positions, ln_pre, blocks, ln_post, projection."""

    config: ViTConfig
    embed_dim: int
    activation: str
    read_early: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        images_BHWC: Float[Array, "B H W 3"],
        train: bool = False,
        ok_B: Bool[Array, " B"] | None = None,
    ) -> Float[Array, "B D"]:
        """Features of normalised images, not of unit length; `train` and `ok_B` change nothing."""
        del train, ok_B
        c = self.config
        size = c.patch_size
        x_BHWD = nn.Conv(
            c.width,
            (size, size),
            strides=(size, size),
            padding="VALID",
            use_bias=False,
            kernel_init=torch_uniform(3 * size * size),
            dtype=self.dtype,
            name="conv1",
        )(images_BHWC)
        batch = x_BHWD.shape[0]
        x_BLD = x_BHWD.reshape(batch, -1, c.width)

        small = normal(c.width**-0.5)
        class_D = self.param("class_embedding", small, (c.width,))
        position_LD = self.param("positional_embedding", small, (c.grid_size**2 + 1, c.width))
        class_B1D = jnp.broadcast_to(class_D.astype(x_BLD.dtype), (batch, 1, c.width))
        x_BLD = jnp.concatenate([class_B1D, x_BLD], axis=1) + position_LD.astype(x_BLD.dtype)
        x_BLD = LayerNorm(name="ln_pre")(x_BLD)

        x_BD = Transformer(
            c.layers,
            c.heads,
            c.mlp_width,
            self.activation,
            vision_block_init(c.width, c.mlp_width),
            is_causal=False,
            read_early=self.read_early,
            dtype=self.dtype,
            name="transformer",
        )(x_BLD, jnp.zeros(batch, jnp.int32))
        x_BD = LayerNorm(name="ln_post")(x_BD)
        projection_DD = self.param("proj", small, (c.width, self.embed_dim))
        return x_BD @ projection_DD.astype(x_BD.dtype)
