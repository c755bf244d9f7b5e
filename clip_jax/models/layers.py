"""What both transformers are made of: activations, initializers, attention, residual blocks."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clip_jax.models.attention import attend, attend_packed, choose_kernel
from clip_jax.models.block_form import BlockForm
from clip_jax.models.execution import ExecConfig, dense_product
from clip_jax.models.layer_norm import layer_norm, layer_norm_for_gpu
from clip_jax.models.minimal_block import PROJECTIONS, BlockParts, residual_block
from clip_jax.models.packing import Packing, choose_packing
from clip_jax.models.pooled_block import pooled_block

Initializer = Callable[..., jax.Array]

LAYER_NORM_EPS = 1e-5  # PyTorch's default, which CLIP was trained with; SigLIP has flax's 1e-6


def quick_gelu(x: Array) -> Array:
    """Return x * sigmoid(1.702 x), the activation of OpenAI's models (`clip/model.py`)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """Return the exact GELU, by erf; `jax.nn.gelu` alone would be the tanh approximation."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Array) -> Array:
    """Return the tanh approximation of GELU: big_vision's, which trained SigLIP."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": jax.nn.relu,
}


def uniform(bound: float) -> Initializer:
    """Return the initializer that is uniform on [-bound, bound]."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def normal(std: float) -> Initializer:
    """Return the normal initializer of this standard deviation, not truncated."""
    return nn.initializers.normal(std)


def torch_uniform(fan_in: int) -> Initializer:
    """Return PyTorch's default for Linear and Conv, weight and bias: uniform on ±fan_in^-1/2."""
    return uniform(fan_in**-0.5)


def zeros(fan_in: int) -> Initializer:
    """Return the initializer that gives zeros, whatever the fan-in."""
    del fan_in
    return nn.initializers.zeros


@dataclasses.dataclass(frozen=True)
class BlockInit:
    """The initializers of a residual block's four matrices, and of the MLP's biases by fan-in."""

    attention_in: Initializer
    attention_out: Initializer
    c_fc: Initializer
    c_proj: Initializer
    mlp_bias: Callable[[int], Initializer] = torch_uniform


def vision_block_init(width: int, mlp_width: int) -> BlockInit:
    """Return PyTorch's defaults, which OpenAI leaves in place in the image tower.

    The in-projection is Xavier-uniform over the fused [3 * width, width] matrix.
    """
    return BlockInit(
        attention_in=uniform((6 / (4 * width)) ** 0.5),
        attention_out=torch_uniform(width),
        c_fc=torch_uniform(width),
        c_proj=torch_uniform(mlp_width),
    )


def timm_block_init() -> BlockInit:
    """Return timm's `init_weights_vit_timm`, from which open_clip starts SigLIP's image towers."""
    # trunc_normal_ cuts at 2, which is a hundred deviations: a plain normal.
    small = normal(0.02)
    return BlockInit(small, small, small, small, mlp_bias=zeros)


def text_block_init(width: int, layers: int) -> BlockInit:
    """Return the text tower's part of `CLIP.initialize_parameters` (OpenAI's `clip/model.py`)."""
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
        """Return rows of mean 0 and variance 1, times the gain, plus the bias."""
        scale_D = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias_D = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return layer_norm(x, scale_D, bias_D, self.epsilon)


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
        key_lengths_B: Int[Array, " B"] | None = None,
        positions_BL: Int[Array, "B L"] | None = None,
    ) -> Array:
        """Return a row for each row of `query_BLD`.

        `key_lengths_B`: how many leading rows of `x_BLD` the queries see; None is all.
        `positions_BL`: see `attention.attend_packed`.
        """
        width, target = x_BLD.shape[-1], self.exec_config.target
        product = dense_product(self.exec_config)

        def project(name: str) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                (self.heads, width // self.heads),
                kernel_init=self.block_init.attention_in,
                dtype=self.exec_config.dtype,
                dot_general=product,
                name=name,
            )

        q_BLNK = project("q_proj")(query_BLD)
        k_BLNK = project("k_proj")(x_BLD)
        v_BLNK = project("v_proj")(x_BLD)
        if positions_BL is not None:
            y_BLNK = attend_packed(q_BLNK, k_BLNK, v_BLNK, positions_BL)
        else:
            y_BLNK = attend(
                q_BLNK,
                k_BLNK,
                v_BLNK,
                is_causal=is_causal,
                key_lengths_B=key_lengths_B,
                implementation=self.exec_config.attention,
                target=target,
            )
        return nn.DenseGeneral(
            width,
            axis=(-2, -1),
            kernel_init=self.block_init.attention_out,
            dtype=self.exec_config.dtype,
            dot_general=product,
            name="out_proj",
        )(y_BLNK)


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    mlp_width: int
    activation: str
    block_init: BlockInit
    exec_config: ExecConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return the features of each row, the width as before."""
        width, dtype = x.shape[-1], self.exec_config.dtype
        product = dense_product(self.exec_config)
        h = nn.Dense(
            self.mlp_width,
            kernel_init=self.block_init.c_fc,
            bias_init=self.block_init.mlp_bias(width),
            dtype=dtype,
            dot_general=product,
            name="c_fc",
        )(x)
        return nn.Dense(
            width,
            kernel_init=self.block_init.c_proj,
            bias_init=self.block_init.mlp_bias(self.mlp_width),
            dtype=dtype,
            dot_general=product,
            name="c_proj",
        )(ACTIVATIONS[self.activation](h))


class LayerScale(nn.Module):
    """Learned gains of the features, `initial` at the start (Touvron et al. 2021, CaiT)."""

    initial: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return the features times their gains."""
        gamma_D = self.param("gamma", nn.initializers.constant(self.initial), (x.shape[-1],))
        return x * gamma_D.astype(x.dtype)


def gather_rows(x_BLD: Float[Array, "B L D"], index_B: Int[Array, " B"]) -> Float[Array, "B 1 D"]:
    """Return row `index_B[i]` of sequence i."""
    return jnp.take_along_axis(x_BLD, index_B[:, None, None], axis=1)


def scale_path(y_BLD: Array, path_scale_B2: Array | None, branch: int) -> Array:
    """Return a branch, each sequence's times its factor: stochastic depth (arXiv:1603.09382)."""
    if path_scale_B2 is None:
        return y_BLD
    return y_BLD * path_scale_B2[:, branch, None, None].astype(y_BLD.dtype)


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """The sizes and choices that the blocks of a stack have in common.

    Attributes:
      heads, mlp_width: sizes; the width is the input's.
      activation: of the MLP, a name in `ACTIVATIONS`.
      norm_eps: of the layer norms.
      init: of the matrices.
      is_causal: a row sees itself and those before it.
      layer_scale: start of the gains on both residual branches; None has no such gains.
      form: what sets the block apart from CLIP's; None is CLIP's own.
    """

    heads: int
    mlp_width: int
    activation: str
    norm_eps: float
    init: BlockInit
    is_causal: bool = False
    layer_scale: float | None = None
    form: BlockForm | None = None


def stream_kernel(
    config: BlockConfig, exec_config: ExecConfig, batch: int, length: int, width: int
) -> str:
    """Return the name of the kernel that blocks with their own backward pass attend with."""
    kernel = choose_kernel(
        exec_config.attention,
        exec_config.target,
        dtype=exec_config.dtype,
        heads=config.heads,
        head_size=width // config.heads,
        queries=length,
        keys=length,
    )
    has_rows = kernel.name != "pallas" or exec_config.target.shares(batch)
    return kernel.name if has_rows else "xla"


def stream_packing(
    config: BlockConfig, exec_config: ExecConfig, shape: tuple[int, ...], *, is_ragged: bool = False
) -> Packing:
    """Return how those blocks lay out a residual stream [B, L, D] of this shape.

    `is_ragged`: its rows are segments of shorter sequences.
    """
    batch, length, width = shape
    if is_ragged:
        return Packing(batch, length, length, is_ragged=True)
    kernel = stream_kernel(config, exec_config, batch, length, width)
    if kernel == "pallas":
        return choose_packing(batch, length, exec_config.target)
    # cuDNN takes even lengths: padded once, and not at every attention.
    return Packing(batch, length, length + length % 2 if kernel == "cudnn" else length)


def block_parts(
    config: BlockConfig, exec_config: ExecConfig, packing: Packing, width: int
) -> BlockParts:
    """Return the parts of a block that keeps the least, for rows packed so."""
    heads, target, dtype = config.heads, exec_config.target, exec_config.dtype
    activation, in_scan = ACTIVATIONS[config.activation], exec_config.in_scan

    # Under a causal mask no row sees what is behind it.
    is_padded = packing.stride > packing.length and not config.is_causal
    key_lengths_B = jnp.full(packing.batch, packing.length, jnp.int32)

    def attend_heads(
        q_ND: Array, k_ND: Array, v_ND: Array, bias_3D: Array, positions_SR: Array | None
    ) -> Array:
        q, k, v = (
            (x + bias_3D[i].astype(x.dtype)).reshape(packing.batch, packing.stride, heads, -1)
            for i, x in enumerate((q_ND, k_ND, v_ND))
        )
        if positions_SR is not None:
            return attend_packed(q, k, v, positions_SR).reshape(q_ND.shape)
        y_BLNK = attend(
            q,
            k,
            v,
            is_causal=config.is_causal,
            key_lengths_B=key_lengths_B if is_padded else None,
            implementation=exec_config.attention,
            target=target,
        )
        return y_BLNK.reshape(q_ND.shape)

    def plain_norm(x: Array, scale_D: Array, bias_D: Array) -> Array:
        if target.platform == "cuda":
            # One device takes no sums first: in a loop nothing does (`BlockParts.sums_rows_first`).
            summing = target.alone if in_scan else target
            return layer_norm_for_gpu(x, scale_D, bias_D, config.norm_eps, summing)
        return layer_norm(x, scale_D, bias_D, config.norm_eps)

    def norm(x: Array, scale_D: Array, bias_D: Array) -> tuple[Array, Array]:
        return x, plain_norm(x, scale_D, bias_D)

    kernel = stream_kernel(config, exec_config, packing.batch, packing.length, width)
    # XLA's kernel would keep the probabilities.
    keeps_them = kernel == "xla" or packing.is_ragged
    attend_again = jax.checkpoint(attend_heads) if keeps_them else attend_heads
    # Heads may be split over the devices: then three products stay in place, and one would not.
    each = tuple((name,) for name in PROJECTIONS)
    parts = BlockParts(each, norm, attend_again, plain_norm, activation, dtype, target, in_scan)
    return _with_kernels(parts, config, packing) if kernel == "pallas" else parts


def _with_kernels(parts: BlockParts, config: BlockConfig, packing: Packing) -> BlockParts:
    """Return a block's parts with the TPU's kernels, which take what one product makes."""
    # Importing Pallas takes half a second, which other devices need not spend.
    from clip_jax.models.kernels.attention import Heads, short_attention
    from clip_jax.models.kernels.norm import Norm, residual_norm

    spec = Heads(config.heads, config.is_causal, parts.target, packing)
    fast_norm = Norm(config.norm_eps, parts.target)

    def norm_segments(x: Array, scale_D: Array, bias_D: Array) -> tuple[Array, Array]:
        x_SRD, y_SRD = residual_norm(packing.segments(x), scale_D, bias_D, fast_norm)
        return x_SRD.reshape(x.shape), y_SRD.reshape(x.shape)

    def attend_segments(qkv_NE: Array, bias_3D: Array, positions_SR: Array | None) -> Array:
        y_SRD = short_attention(packing.segments(qkv_NE), bias_3D, spec, positions_SR)
        return y_SRD.reshape(-1, bias_3D.shape[1])

    return dataclasses.replace(
        parts, projections=(PROJECTIONS,), norm=norm_segments, attend=attend_segments
    )


class ResidualBlock(nn.Module):
    """Pre-LN attention and MLP, each with a residual connection."""

    config: BlockConfig
    exec_config: ExecConfig

    @nn.compact
    def __call__(
        self,
        x_BLD: Array,
        pool_index_B: Int[Array, " B"] | None = None,
        packing: Packing | None = None,
        positions_BL: Int[Array, "B L"] | None = None,
        path_scale_B2: Float[Array, "B 2"] | None = None,
    ) -> Array:
        """Return all rows [B, L, D], or with `pool_index_B` that row of every sequence [B, 1, D].

        With `packing` rows are given as [N, D], all rows are returned so, and the block has its
        own backward pass. With `positions_BL` the rows are segments of shorter sequences, see
        `attention.attend_packed`. `path_scale_B2`: factors of both branches, without `packing`.

        The one row is equal to that row of all, because a row of the output depends on the other
        rows through keys and values alone: its query, out-projection and MLP are its own.
        """
        c = self.config
        if packing is not None:
            parts = block_parts(c, self.exec_config, packing, x_BLD.shape[-1])
            params = self.variables["params"]
            if pool_index_B is None:
                return residual_block(parts, params, x_BLD, positions_BL)
            return pooled_block(parts, params, x_BLD, pool_index_B, packing, is_causal=c.is_causal)
        attention = Attention(c.heads, c.init, self.exec_config, name="attn")
        h_BLD = LayerNorm(c.norm_eps, name="ln_1")(x_BLD)
        if pool_index_B is None:
            y_BLD = attention(h_BLD, h_BLD, is_causal=c.is_causal, positions_BL=positions_BL)
        else:
            key_lengths_B = pool_index_B + 1 if c.is_causal else None
            query_BLD = gather_rows(h_BLD, pool_index_B)
            y_BLD = attention(query_BLD, h_BLD, key_lengths_B=key_lengths_B)
            x_BLD = gather_rows(x_BLD, pool_index_B)
        x_BLD = x_BLD + scale_path(self._scaled(y_BLD, "ls_1"), path_scale_B2, 0)
        mlp = MLP(c.mlp_width, c.activation, c.init, self.exec_config, name="mlp")
        y_BLD = mlp(LayerNorm(c.norm_eps, name="ln_2")(x_BLD))
        return x_BLD + scale_path(self._scaled(y_BLD, "ls_2"), path_scale_B2, 1)

    def _scaled(self, y_BLD: Array, name: str) -> Array:
        """Apply the layer scale of this name, if there is one."""
        initial = self.config.layer_scale
        return y_BLD if initial is None else LayerScale(initial, name=name)(y_BLD)
