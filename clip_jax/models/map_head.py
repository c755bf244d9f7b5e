"""SigLIP's pooling of an image: multi-head attention of one learned query (Zhai et al. 2022)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clip_jax.models.execution import ExecConfig
from clip_jax.models.layers import MLP, Attention, BlockConfig, LayerNorm


class MAPHead(nn.Module):
    """Attention of a learned probe over all rows, then a residual MLP.

    The attention itself has no residual connection, and the probe no layer norm.
    """

    config: BlockConfig
    exec_config: ExecConfig

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], key_lengths_B: Int[Array, " B"] | None = None
    ) -> Float[Array, "B D"]:
        """Return one vector of each sequence, or of its first `key_lengths_B` rows."""
        c = self.config
        batch, _, width = x_BLD.shape
        # Of timm's AttentionPoolLatent: a normal cut at two of its deviations.
        init = nn.initializers.truncated_normal(width**-0.5)
        probe_1D = self.param("probe", init, (1, width))
        probe_B1D = jnp.broadcast_to(probe_1D.astype(x_BLD.dtype), (batch, 1, width))
        attention = Attention(c.heads, c.init, self.exec_config, name="attn")
        x_B1D = attention(probe_B1D, x_BLD, key_lengths_B=key_lengths_B)
        mlp = MLP(c.mlp_width, c.activation, c.init, self.exec_config, name="mlp")
        return (x_B1D + mlp(LayerNorm(c.norm_eps, name="ln")(x_B1D)))[:, 0]
