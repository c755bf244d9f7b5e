"""FastViT (Vasu et al. 2023, arXiv:2303.14189), the image tower of MobileCLIP, as it is run.

It is trained with several branches of convolutions and batch norms side by side. Each such group
is one convolution with a bias here, into which `pretrained.reparameterize` folds a file's, as timm
does for inference: the features are the same, and there are no batch statistics.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clip_jax.errors import check_choice
from clip_jax.models.attention import attend
from clip_jax.models.depthwise import DepthwiseConv
from clip_jax.models.execution import DEFAULT_EXEC_CONFIG, ExecConfig, dense_product, remat_block
from clip_jax.models.layers import (
    MLP,
    LayerNorm,
    LayerScale,
    gelu,
    normal,
    timm_block_init,
    torch_uniform,
)
from clip_jax.models.sizes import check_sizes

NORMS = ("affine", "layer")
STEM, HALVING = 4, 2  # by how much the stem and each later stage shrink the image
HEAD_SIZE = 32
EXPANSION = 2  # of the last convolution
INIT = timm_block_init()


@dataclasses.dataclass(frozen=True)
class FastViTConfig:
    """The sizes of a FastViT.

    Attributes:
      image_size: side of the square input, pixels.
      depths, widths: blocks and features of each stage.
      mlp_ratio: hidden features of the MLPs over the width.
      attention_from: the first stage, from 0, whose blocks have attention, not convolutions.
      squeeze_from: the first stage behind whose halving channels are weighted by their means.
      norm: before attention: "affine", a batch norm folded; "layer", a layer norm.
    """

    image_size: int
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    mlp_ratio: float = 3.0
    attention_from: int = 3
    squeeze_from: int = 2
    norm: str = "affine"

    def __post_init__(self) -> None:
        check_sizes(self, "vision")
        check_choice("vision.norm", self.norm, NORMS)

    @property
    def grid_size(self) -> int:
        """Return the side of the last stage's features."""
        return self.image_size // (STEM * HALVING ** (len(self.depths) - 1))


class SqueezeExcite(nn.Module):
    """Weights of the channels, from their means over all places (Hu et al. 2018)."""

    hidden: int
    exec_config: ExecConfig

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Return the features times the weights of their channels."""
        dtype = self.exec_config.dtype
        mean_B11C = jnp.mean(x_BHWC, axis=(1, 2), keepdims=True)
        h = nn.relu(nn.Dense(self.hidden, dtype=dtype, name="fc1")(mean_B11C))
        return x_BHWC * nn.sigmoid(nn.Dense(x_BHWC.shape[-1], dtype=dtype, name="fc2")(h))


class Affine(nn.Module):
    """A gain and a bias of each feature: what a batch norm is when it is not trained."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return the features times the gains, plus the biases."""
        scale_D = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias_D = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return x * scale_D.astype(x.dtype) + bias_D.astype(x.dtype)


class PlaceAttention(nn.Module):
    """Attention of all places to all places; only its last matrix has a bias."""

    exec_config: ExecConfig

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Return features of the same shape."""
        width, exec_config = x_BHWC.shape[-1], self.exec_config
        x_BLD = x_BHWC.reshape(x_BHWC.shape[0], -1, width)
        options: dict[str, Any] = {
            "dtype": exec_config.dtype,
            "dot_general": dense_product(exec_config),
        }
        q, k, v = (
            nn.DenseGeneral(
                (width // HEAD_SIZE, HEAD_SIZE),
                use_bias=False,
                kernel_init=INIT.attention_in,
                name=name,
                **options,
            )(x_BLD)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        y_BLNK = attend(q, k, v, implementation=exec_config.attention, target=exec_config.target)
        y_BLD = nn.DenseGeneral(
            width, axis=(-2, -1), kernel_init=INIT.attention_out, name="out_proj", **options
        )(y_BLNK)
        return y_BLD.reshape(x_BHWC.shape)


class FastViTBlock(nn.Module):
    """Mixing of places, by a convolution or by attention, and an MLP behind a 7x7 convolution."""

    config: FastViTConfig
    has_attention: bool
    exec_config: ExecConfig

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Return features of the same shape."""
        width = x_BHWC.shape[-1]
        if self.has_attention:
            norm = LayerNorm(name="ln") if self.config.norm == "layer" else Affine(name="ln")
            y_BHWC = PlaceAttention(self.exec_config, name="attn")(norm(x_BHWC))
            x_BHWC = x_BHWC + LayerScale(1e-5, name="ls_1")(y_BHWC)
        else:
            x_BHWC = self._depthwise(3, "mix_conv")(x_BHWC)
        y_BHWC = self._depthwise(7, "mlp_conv")(x_BHWC)
        hidden = int(width * self.config.mlp_ratio)
        y_BHWC = MLP(hidden, "gelu", INIT, self.exec_config, name="mlp")(y_BHWC)
        scale = LayerScale(1e-5, name="ls_2" if self.has_attention else "ls")
        return x_BHWC + scale(y_BHWC)

    def _depthwise(self, size: int, name: str) -> DepthwiseConv:
        return DepthwiseConv(size, exec_config=self.exec_config, name=name)


class FastViTStage(nn.Module):
    """Blocks of one width, behind a halving of the resolution in all stages but the first."""

    config: FastViTConfig
    number: int
    exec_config: ExecConfig

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Return the stage's features."""
        c, dtype = self.config, self.exec_config.dtype
        width = c.widths[self.number]
        if self.number:
            ratio = width // x_BHWC.shape[-1]
            x_BHWC = DepthwiseConv(
                7, HALVING, exec_config=self.exec_config, multiplier=ratio, name="down_conv"
            )(x_BHWC)
            if self.number >= c.squeeze_from:
                x_BHWC = SqueezeExcite(width // 4, self.exec_config, name="down_se")(x_BHWC)
            x_BHWC = gelu(nn.Dense(width, dtype=dtype, name="down_proj")(gelu(x_BHWC)))
        has_attention = self.number >= c.attention_from
        if has_attention:
            x_BHWC = DepthwiseConv(7, exec_config=self.exec_config, name="pos_conv")(x_BHWC)
        block = remat_block(FastViTBlock, self.exec_config)
        for i in range(c.depths[self.number]):
            x_BHWC = block(c, has_attention, self.exec_config, name=f"blocks_{i}")(x_BHWC)
        return x_BHWC


class FastViT(nn.Module):
    """The image tower: a stem of convolutions, stages, a last convolution, mean and projection."""

    config: FastViTConfig
    embed_dim: int
    exec_config: ExecConfig = DEFAULT_EXEC_CONFIG

    @nn.compact
    def __call__(
        self,
        images_BHWC: Float[Array, "B H W 3"],
        train: bool = False,
        valid_B: Bool[Array, " B"] | None = None,
        patch_ids_Bl: None = None,
    ) -> Float[Array, "B D"]:
        """Return features of normalized images, with the arguments of `VisionTransformer`."""
        del train, valid_B, patch_ids_Bl
        c, dtype = self.config, self.exec_config.dtype
        first = nn.Conv(
            c.widths[0],
            (3, 3),
            strides=(2, 2),
            padding=((1, 1), (1, 1)),
            kernel_init=torch_uniform(27),
            dtype=dtype,
            name="stem_0",
        )
        x_BHWC = gelu(first(images_BHWC))
        second = DepthwiseConv(3, 2, exec_config=self.exec_config, name="stem_1")
        x_BHWC = gelu(second(x_BHWC))
        x_BHWC = gelu(nn.Dense(c.widths[0], dtype=dtype, name="stem_2")(x_BHWC))
        for number in range(len(c.depths)):
            stage = FastViTStage(c, number, self.exec_config, name=f"stages_{number}")
            x_BHWC = stage(x_BHWC)
        last = DepthwiseConv(
            3, exec_config=self.exec_config, multiplier=EXPANSION, name="final_conv"
        )
        x_BHWC = last(x_BHWC)
        width = x_BHWC.shape[-1]
        x_BHWC = gelu(SqueezeExcite(width // 16, self.exec_config, name="final_se")(x_BHWC))
        x_BD = jnp.mean(x_BHWC, axis=(1, 2))
        projection_DD = self.param("proj", normal(width**-0.5), (width, self.embed_dim))
        bias_D = self.param("proj_bias", nn.initializers.zeros, (self.embed_dim,))
        return x_BD @ projection_DD.astype(x_BD.dtype) + bias_D.astype(x_BD.dtype)


def fastvit_flops(c: FastViTConfig, embed_dim: int) -> int:
    """Count the operations that embed one image, two a multiply-add."""
    side, fan_in = c.image_size // 2, c.widths[0]
    total = side**2 * 27 * fan_in
    side //= 2
    total += side**2 * (9 * fan_in + fan_in**2)
    for stage, (width, depth) in enumerate(zip(c.widths, c.depths, strict=True)):
        if stage:
            side //= HALVING
            total += side**2 * (49 * width + width**2)
            total += 2 * width * (width // 4) * (stage >= c.squeeze_from)
        places = side**2
        if stage >= c.attention_from:
            total += places * 49 * width
            mixing = places * 4 * width**2 + 2 * places**2 * width
        else:
            mixing = places * 9 * width
        hidden = int(width * c.mlp_ratio)
        total += depth * (mixing + places * (49 * width + 2 * width * hidden))
        fan_in = width
    wide = EXPANSION * fan_in
    total += side**2 * 9 * wide + 2 * wide * (wide // 16) + wide * embed_dim
    return 2 * total
