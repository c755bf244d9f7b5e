"""The modified ResNet of CLIP (paper section 2.4; OpenAI `clip/model.py` ModifiedResNet).

Three things set it apart from a plain ResNet-50: a stem of three convolutions and an average
pool, every stride an average pool (in the shortcut too), and attention pooling at the end.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from clip_jax.models.attention import attend, float32_logits
from clip_jax.models.batch_norm import ValidRows, valid_rows
from clip_jax.models.convolution import conv, normalized
from clip_jax.models.execution import DEFAULT_EXEC_CONFIG, ExecConfig, remat_block
from clip_jax.models.layers import normal, torch_uniform
from clip_jax.models.sizes import check_sizes
from clip_jax.models.target import Target

EXPANSION = 4  # a bottleneck's output features over its inner ones
HEAD_SIZE = 64


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """The sizes of a modified ResNet.

    Attributes:
      image_size: side of the square input, pixels; a multiple of 32.
      layers: bottlenecks in each of the four stages.
      width: features of the first stage's bottlenecks.
    """

    image_size: int
    layers: tuple[int, int, int, int]
    width: int

    def __post_init__(self) -> None:
        check_sizes(self, "vision")

    @property
    def features(self) -> int:
        """Return the number of features of the last stage."""
        return self.width * 8 * EXPANSION

    @property
    def heads(self) -> int:
        """Return the number of heads of the attention pool."""
        return self.features // HEAD_SIZE

    @property
    def grid_size(self) -> int:
        """Return the number of positions along a side of the last feature map."""
        return self.image_size // 32


POOLED_BY_PRODUCTS = 256
"""Features up to which a TPU pools by products: their number grows with the square."""


def average_pool(x_BHWC: Array, size: int, target: Target) -> Array:
    """Return the means of squares of this side, which is also the stride.

    On TPUs where there are few features as a convolution with a multiple of the identity, whose
    gradient is one too, which sums and adds what is beside it while it is computed.
    """
    if size == 1:
        return x_BHWC
    features = x_BHWC.shape[-1]
    if target.platform != "tpu" or features > POOLED_BY_PRODUCTS:
        return nn.avg_pool(x_BHWC, (size, size), (size, size))
    kernel = jnp.eye(features, dtype=x_BHWC.dtype) / size**2
    return jax.lax.conv_general_dilated(
        x_BHWC,
        jnp.broadcast_to(kernel, (size, size, features, features)),
        (size, size),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )


class Bottleneck(nn.Module):
    """A 1x1, a 3x3, a pool and a 1x1, with the shortcut pooled before its own 1x1."""

    width: int
    stride: int
    exec_config: ExecConfig

    @nn.compact
    def __call__(self, x_BHWC: Array, train: bool, rows: ValidRows | None) -> Array:
        """Return the block's output; statistics are taken of `rows`."""
        fan_in, out = x_BHWC.shape[-1], self.width * EXPANSION
        dtype = self.exec_config.dtype
        norm = functools.partial(normalized, rows=rows, train=train, exec_config=self.exec_config)

        y = norm(
            conv(self.width, 1, fan_in, dtype=dtype, name="conv1"), x_BHWC, relu=True, name="bn1"
        )
        y = norm(
            conv(self.width, 3, self.width, dtype=dtype, name="conv2"), y, relu=True, name="bn2"
        )
        y = average_pool(y, self.stride, self.exec_config.target)
        # A zero scale makes every block start as the identity.
        y = norm(
            conv(out, 1, self.width, dtype=dtype, name="conv3"), y, zero_scale=True, name="bn3"
        )

        if self.stride > 1 or fan_in != out:
            x_BHWC = average_pool(x_BHWC, self.stride, self.exec_config.target)
            downsample = conv(out, 1, fan_in, dtype=dtype, name="downsample_0")
            x_BHWC = norm(downsample, x_BHWC, name="downsample_1")
        return nn.relu(y + x_BHWC)


class AttentionPool(nn.Module):
    """Attention of one query, the mean of all positions, over them and itself."""

    heads: int
    embed_dim: int
    exec_config: ExecConfig

    @nn.compact
    def __call__(self, x_BHWD: Array) -> Float[Array, "B D"]:
        """Return the projected features of each feature map."""
        batch, height, width, features = x_BHWD.shape
        x_BLD = x_BHWD.reshape(batch, height * width, features)
        x_BLD = jnp.concatenate([x_BLD.mean(axis=1, keepdims=True), x_BLD], axis=1)
        std = features**-0.5
        position_LD = self.param("positional_embedding", normal(std), x_BLD.shape[1:])
        x_BLD = x_BLD + position_LD.astype(x_BLD.dtype)
        # Parameters are drawn by the modules below.
        if self.exec_config.target.platform != "cpu" and not self.is_initializing():
            return pool_unprojected(self.variables["params"], x_BLD, self.exec_config.dtype)

        def project(name: str) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                (self.heads, features // self.heads),
                kernel_init=normal(std),
                bias_init=torch_uniform(features),
                dtype=self.exec_config.dtype,
                name=name,
            )

        q_B1NK = project("q_proj")(x_BLD[:, :1])
        k_BLNK, v_BLNK = project("k_proj")(x_BLD), project("v_proj")(x_BLD)
        y_B1NK = attend(
            q_B1NK,
            k_BLNK,
            v_BLNK,
            implementation=self.exec_config.attention,
            target=self.exec_config.target,
        )
        return nn.DenseGeneral(
            self.embed_dim,
            axis=(-2, -1),
            kernel_init=normal(std),
            bias_init=torch_uniform(features),
            dtype=self.exec_config.dtype,
            name="c_proj",
        )(y_B1NK)[:, 0]


def pool_unprojected(params: Any, x_BLD: Array, dtype: DTypeLike) -> Float[Array, "B D"]:
    """Return what `AttentionPool` does with these parameters; no row becomes a key or a value.

    Equal by associativity, to rounding, as in `pooled_block`: the one query meets the rows in their
    own space, and the rows are summed before they are projected. A key's bias adds the same to all
    logits of a head.
    """

    def project(name: str, equation: str, x: Array) -> Array:
        return jnp.einsum(equation, x, params[name]["kernel"].astype(dtype))

    def bias(name: str) -> Array:
        return params[name]["bias"].astype(dtype)

    q_BNK = project("q_proj", "bd,dnk->bnk", x_BLD[:, 0]) + bias("q_proj")
    q_BND = project("k_proj", "bnk,dnk->bnd", q_BNK)
    logits_BNL = float32_logits(q_BND, x_BLD)
    p_BNL = jax.nn.softmax(logits_BNL * q_BNK.shape[-1] ** -0.5, axis=-1).astype(dtype)
    y_BND = jnp.einsum("bnl,bld->bnd", p_BNL, x_BLD)
    y_BNK = project("v_proj", "bnd,dnk->bnk", y_BND) + bias("v_proj")
    return project("c_proj", "bnk,nkd->bd", y_BNK) + bias("c_proj")


class ModifiedResNet(nn.Module):
    """The image tower of CLIP's ResNets. It keeps running statistics in `batch_stats`."""

    config: ResNetConfig
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
        """Return features of normalized images, not of unit length.

        With `train` the statistics of the batch's valid rows are used (all are where `valid_B` is
        None), and the running ones updated where the caller makes `batch_stats` mutable.
        `patch_ids_Bl` is of the transformers: there are no patches to choose here.
        """
        del patch_ids_Bl
        rows = valid_rows(valid_B, self.exec_config.target)
        c = self.config
        stem = remat_block(ModifiedResNet._stem, self.exec_config, (2,))
        x = stem(self, images_BHWC.astype(self.exec_config.dtype), train, rows)
        block = remat_block(Bottleneck, self.exec_config, (2,))
        for stage, blocks in enumerate(c.layers):
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                name = f"layer{stage + 1}_{i}"
                x = block(c.width * 2**stage, stride, self.exec_config, name=name)(x, train, rows)
        return AttentionPool(c.heads, self.embed_dim, self.exec_config, name="attnpool")(x)

    def _stem(self, x: Array, train: bool, rows: ValidRows | None) -> Array:
        """Apply three convolutions and a pool, which leave a quarter of the side."""
        width, dtype = self.config.width, self.exec_config.dtype
        sizes = [(width // 2, 2), (width // 2, 1), (width, 1)]
        for i, (features, stride) in enumerate(sizes, start=1):
            x = normalized(
                conv(features, 3, x.shape[-1], stride=stride, dtype=dtype, name=f"conv{i}"),
                x,
                rows,
                train=train,
                exec_config=self.exec_config,
                relu=True,
                name=f"bn{i}",
            )
        return average_pool(x, 2, self.exec_config.target)
