"""The pieces both transformers share: activations, initializers, attention, one residual block."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from clip_jax.models.attention import attend
from clip_jax.models.execution import ExecConfig, merged_product, remat_block

Initializer = Callable[..., jax.Array]

LAYER_NORM_EPS = 1e-5  # PyTorch's default, which CLIP was trained with; SigLIP has flax's 1e-6


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x), the activation of OpenAI's models (`clip/model.py`)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """The exact, erf form; `jax.nn.gelu` alone would be the tanh approximation."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Array) -> Array:
    """The tanh approximation: big_vision's, which trained SigLIP."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu, "gelu_tanh": gelu_tanh}


def uniform(bound: float) -> Initializer:
    """Uniform on [-bound, bound]."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def normal(std: float) -> Initializer:
    """Normal with this standard deviation, not truncated."""
    return nn.initializers.normal(std)


def torch_uniform(fan_in: int) -> Initializer:
    """PyTorch's default for Linear and Conv, weight and bias: U(-fan_in^-1/2, fan_in^-1/2)."""
    return uniform(fan_in**-0.5)


def zeros(fan_in: int) -> Initializer:
    """Zeros, whatever the fan-in."""
    del fan_in
    return nn.initializers.zeros


@dataclasses.dataclass(frozen=True)
class BlockInit:
    """Initializers of a residual block's four matrices, and of the MLP's biases by fan-in."""

    attention_in: Initializer
    attention_out: Initializer
    c_fc: Initializer
    c_proj: Initializer
    mlp_bias: Callable[[int], Initializer] = torch_uniform


def vision_block_init(width: int, mlp_width: int) -> BlockInit:
    """PyTorch's defaults, which OpenAI leaves in place in the image tower.

    The in-projection is Xavier-uniform over the fused [3 * width, width] matrix.
    """
    return BlockInit(
        attention_in=uniform((6 / (4 * width)) ** 0.5),
        attention_out=torch_uniform(width),
        c_fc=torch_uniform(width),
        c_proj=torch_uniform(mlp_width),
    )


def timm_block_init() -> BlockInit:
    """timm's `init_weights_vit_timm`, from which open_clip starts SigLIP's image towers."""
    # trunc_normal_ cuts at 2, which is a hundred deviations: a plain normal.
    small = normal(0.02)
    return BlockInit(small, small, small, small, mlp_bias=zeros)


def text_block_init(width: int, layers: int) -> BlockInit:
    """`CLIP.initialize_parameters` of OpenAI's `clip/model.py`: the text tower only."""
    residual = width**-0.5 * (2 * layers) ** -0.5
    return BlockInit(
        attention_in=normal(width**-0.5),
        attention_out=normal(residual),
        c_fc=normal((2 * width) ** -0.5),
        c_proj=normal(residual),
    )


class LayerNorm(nn.Module):
    """Layer normalization computed in float32, returned in the input's dtype."""

    epsilon: float = LAYER_NORM_EPS

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # In two passes: flax's fast variance, E[x^2] - E[x]^2, cancels where the mean is large.
        x32 = x.astype(jnp.float32)
        deviation = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(deviation), axis=-1, keepdims=True)
        scale_D = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias_D = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        # In this order the factor of a row stays one number until it is multiplied.
        y = deviation * jax.lax.rsqrt(variance + self.epsilon) * scale_D + bias_D
        return y.astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention of a few query rows over all rows."""

    heads: int
    block_init: BlockInit
    exec_config: ExecConfig

    @nn.compact
    def __call__(
        self,
        query_BLD: Array,
        x_BLD: Array,
        *,
        is_causal: bool = False,
        visible_B: Int[Array, " B"] | None = None,
    ) -> Array:
        """`visible_B`: how many leading rows of `x_BLD` the queries may see; None is all."""
        width = x_BLD.shape[-1]

        def project(name: str) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                (self.heads, width // self.heads),
                kernel_init=self.block_init.attention_in,
                dtype=self.exec_config.dtype,
                dot_general=merged_product,
                name=name,
            )

        q_BLNK = project("q_proj")(query_BLD)
        k_BLNK = project("k_proj")(x_BLD)
        v_BLNK = project("v_proj")(x_BLD)
        y_BLNK = attend(
            q_BLNK,
            k_BLNK,
            v_BLNK,
            is_causal=is_causal,
            visible_B=visible_B,
            wanted=self.exec_config.attention,
        )
        return nn.DenseGeneral(
            width,
            axis=(-2, -1),
            kernel_init=self.block_init.attention_out,
            dtype=self.exec_config.dtype,
            dot_general=merged_product,
            name="out_proj",
        )(y_BLNK)


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    mlp_width: int
    activation: str
    block_init: BlockInit
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        h = nn.Dense(
            self.mlp_width,
            kernel_init=self.block_init.c_fc,
            bias_init=self.block_init.mlp_bias(width),
            dtype=self.dtype,
            dot_general=merged_product,
            name="c_fc",
        )(x)
        return nn.Dense(
            width,
            kernel_init=self.block_init.c_proj,
            bias_init=self.block_init.mlp_bias(self.mlp_width),
            dtype=self.dtype,
            dot_general=merged_product,
            name="c_proj",
        )(ACTIVATIONS[self.activation](h))


class LayerScale(nn.Module):
    """Every feature times a learned gain, `initial` at the start (Touvron et al. 2021, CaiT)."""

    initial: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gamma_D = self.param("gamma", nn.initializers.constant(self.initial), (x.shape[-1],))
        return x * gamma_D.astype(x.dtype)


def read_rows(x_BLD: Float[Array, "B L D"], at_B: Int[Array, " B"]) -> Float[Array, "B 1 D"]:
    """Row `at_B[i]` of sequence i."""
    return jnp.take_along_axis(x_BLD, at_B[:, None, None], axis=1)


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """What the blocks of a stack have in common.

    Attributes:
      heads, mlp_width: sizes; the width is the input's.
      activation: of the MLP, a name in `ACTIVATIONS`.
      norm_eps: of the layer norms.
      init: of the matrices.
      is_causal: a row sees itself and those before it.
      layer_scale: start of the gains on both residual branches; None has no such gains.
    """

    heads: int
    mlp_width: int
    activation: str
    norm_eps: float
    init: BlockInit
    is_causal: bool = False
    layer_scale: float | None = None


class ResidualBlock(nn.Module):
    """Pre-LN attention and MLP, each with a residual connection."""

    config: BlockConfig
    exec_config: ExecConfig

    @nn.compact
    def __call__(self, x_BLD: Array, pool_index_B: Int[Array, " B"] | None = None) -> Array:
        """With `pool_index_B`, only that row of every sequence: [B, 1, D].

        Equal to the full block read there, because a row of the output depends on the other
        rows through keys and values alone: its query, out-projection and MLP are its own.
        """
        c = self.config
        attention = Attention(c.heads, c.init, self.exec_config, name="attn")
        h_BLD = LayerNorm(c.norm_eps, name="ln_1")(x_BLD)
        if pool_index_B is None:
            y_BLD = attention(h_BLD, h_BLD, is_causal=c.is_causal)
        else:
            visible_B = pool_index_B + 1 if c.is_causal else None
            y_BLD = attention(read_rows(h_BLD, pool_index_B), h_BLD, visible_B=visible_B)
            x_BLD = read_rows(x_BLD, pool_index_B)
        x_BLD = x_BLD + self._scaled(y_BLD, "ls_1")
        mlp = MLP(c.mlp_width, c.activation, c.init, self.exec_config.dtype, name="mlp")
        y_BLD = mlp(LayerNorm(c.norm_eps, name="ln_2")(x_BLD))
        return x_BLD + self._scaled(y_BLD, "ls_2")

    def _scaled(self, y_BLD: Array, name: str) -> Array:
        initial = self.config.layer_scale
        return y_BLD if initial is None else LayerScale(initial, name=name)(y_BLD)


class Transformer(nn.Module):
    """A stack of residual blocks.

    With `how.scan` all blocks but the last are one block in a loop, `resblocks`, its parameters
    those of `resblocks_0`, `resblocks_1`, ... stacked. The last keeps its own name and parameters:
    it may be computed at one position, which the loop's body cannot be.
    """

    layers: int
    block: BlockConfig
    exec_config: ExecConfig

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], pool_index_B: Int[Array, " B"] | None = None
    ) -> Float[Array, "B l D"]:
        """All rows, or with `pool_index_B` that one of every sequence: l is L or 1.

        Without `how.read_early` the whole last block is computed and then read: the plain form.
        """
        last = self.layers - 1
        if self.exec_config.scan and last > 0:
            x_BLD = self._loop(x_BLD, last)
        block = remat_block(ResidualBlock, self.exec_config)
        for i in range(0 if not self.exec_config.scan else last, last):
            x_BLD = block(self.block, self.exec_config, name=f"resblocks_{i}")(x_BLD)
        early_at_B = pool_index_B if self.exec_config.pool_last_block else None
        x_BLD = block(self.block, self.exec_config, name=f"resblocks_{last}")(x_BLD, early_at_B)
        if pool_index_B is not None and not self.exec_config.pool_last_block:
            x_BLD = read_rows(x_BLD, pool_index_B)
        return x_BLD

    def _loop(self, x_BLD: Float[Array, "B L D"], times: int) -> Float[Array, "B L D"]:
        loop = nn.scan(
            lambda block, x_BLD, _: (block(x_BLD), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=times,
        )
        block = remat_block(ResidualBlock, self.exec_config, looped=True)
        x_BLD, _ = loop(block(self.block, self.exec_config, name="resblocks"), x_BLD, None)
        return x_BLD
