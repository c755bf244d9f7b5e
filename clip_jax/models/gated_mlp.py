"""MLPs whose hidden features are multiplied by a gate (Shazeer 2020, arXiv:2002.05202)."""

import flax.linen as nn
import jax
from jaxtyping import Array

from clip_jax.models.execution import ExecConfig, dense_product
from clip_jax.models.layers import BlockInit, LayerNorm, gelu

GATES = {"swiglu": jax.nn.silu, "geglu": gelu}


class GatedMLP(nn.Module):
    """Two linear layers side by side, one of which is the gate, and one behind their product.

    Attributes:
      mlp_width: hidden features of each of the two.
      gate: a name in `GATES`.
      norm_eps: of a layer norm of the product; None has no such norm.
    """

    mlp_width: int
    gate: str
    norm_eps: float | None
    block_init: BlockInit
    exec_config: ExecConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return the features of each row, the width as before."""
        width = x.shape[-1]

        def linear(name: str, features: int, fan_in: int, init: nn.initializers.Initializer):
            return nn.Dense(
                features,
                kernel_init=init,
                bias_init=self.block_init.mlp_bias(fan_in),
                dtype=self.exec_config.dtype,
                dot_general=dense_product(self.exec_config),
                name=name,
            )

        gate = linear("c_gate", self.mlp_width, width, self.block_init.c_fc)(x)
        h = linear("c_fc", self.mlp_width, width, self.block_init.c_fc)(x)
        h = GATES[self.gate](gate) * h
        if self.norm_eps is not None:
            h = LayerNorm(self.norm_eps, name="ln")(h)
        return linear("c_proj", width, self.mlp_width, self.block_init.c_proj)(h)
