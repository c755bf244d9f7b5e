"""CoCa's pooling of an image: attention of learned queries (Yu et al. 2022, arXiv:2205.01917)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.models.attention import attend
from clip_jax.models.execution import ExecConfig, dense_product
from clip_jax.models.layers import BlockConfig, LayerNorm, normal


class QueryPool(nn.Module):
    """Attention of learned queries over all rows.

    CoCa's captioner reads what all of them give, and its features what the first does. Queries do
    not meet, so that the first alone is computed.

    Attributes:
      config: heads, norms and initialization.
      queries: how many there are.
      width: of the queries and of the result.
      exec_config: how it is computed.
    """

    config: BlockConfig
    queries: int
    width: int
    exec_config: ExecConfig

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B E"]:
        """Return what the first query gives of each sequence."""
        c, exec_config = self.config, self.exec_config
        query_QE = self.param("query", normal(1.0), (self.queries, self.width))
        query_1E = LayerNorm(c.norm_eps, name="ln_q")(query_QE[:1].astype(x_BLD.dtype))
        query_B1E = jnp.broadcast_to(query_1E, (x_BLD.shape[0], *query_1E.shape))
        x_BLD = LayerNorm(c.norm_eps, name="ln_k")(x_BLD)

        def project(name: str, x: Array) -> Array:
            return nn.DenseGeneral(
                (c.heads, self.width // c.heads),
                kernel_init=c.init.attention_in,
                dtype=exec_config.dtype,
                dot_general=dense_product(exec_config),
                name=name,
            )(x)

        y_B1NK = attend(
            project("q_proj", query_B1E),
            project("k_proj", x_BLD),
            project("v_proj", x_BLD),
            implementation=exec_config.attention,
            target=exec_config.target,
        )
        return nn.DenseGeneral(
            self.width,
            axis=(-2, -1),
            kernel_init=c.init.attention_out,
            dtype=exec_config.dtype,
            dot_general=dense_product(exec_config),
            name="out_proj",
        )(y_B1NK)[:, 0]
