"""An image tower in flax's own layers, written the way big_vision writes its ViT.

It is what the compiled table compares our tower with: the same sizes, a class token, learned
positions and one projection, but no kernel, policy or layout of ours.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.models.vit import ViTConfig


class StockTower(nn.Module):
    """A pre-LN vision transformer in bfloat16, its parameters float32."""

    config: ViTConfig
    embed_dim: int

    @nn.compact
    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        """Return an embedding for each image."""
        c, dtype = self.config, jnp.bfloat16
        sides = (c.patch_size, c.patch_size)
        x = nn.Conv(c.width, sides, sides, "VALID", use_bias=False, dtype=dtype)(images_BHWC)
        x = x.reshape(x.shape[0], -1, c.width)
        small = nn.initializers.normal(c.width**-0.5)
        token = self.param("class", small, (1, 1, c.width)).astype(dtype)
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1)
        x = x + self.param("positions", small, (1, x.shape[1], c.width)).astype(dtype)
        x = nn.LayerNorm(dtype=dtype)(x)
        for _ in range(c.layers):
            y = nn.LayerNorm(dtype=dtype)(x)
            x = x + nn.MultiHeadDotProductAttention(c.heads, dtype=dtype)(y, y)
            y = nn.Dense(c.mlp_width, dtype=dtype)(nn.LayerNorm(dtype=dtype)(x))
            x = x + nn.Dense(c.width, dtype=dtype)(nn.gelu(y))
        x = nn.LayerNorm(dtype=dtype)(x[:, 0])
        return nn.Dense(self.embed_dim, use_bias=False, dtype=dtype)(x)
