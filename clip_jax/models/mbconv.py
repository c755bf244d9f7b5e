"""The convolutions before ViTamin's transformer (Chen et al. 2024, arXiv:2404.02132)."""

import flax.linen as nn
from jaxtyping import Array, Float

from clip_jax.models.depthwise import DepthwiseConv
from clip_jax.models.execution import ExecConfig
from clip_jax.models.layers import LayerNorm, gelu, torch_uniform

DEPTHS = (2, 4)  # blocks of the two stages
EXPANSION = 4
NORM_EPS = 1e-6
SHRINKS = 16  # by how much an image's side becomes less


def conv3(features: int, fan_in: int, stride: int, exec_config: ExecConfig, name: str) -> nn.Conv:
    """Return a 3x3 convolution with a bias, padded as PyTorch does."""
    return nn.Conv(
        features,
        (3, 3),
        strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        kernel_init=torch_uniform(9 * fan_in),
        dtype=exec_config.dtype,
        name=name,
    )


class MBConvBlock(nn.Module):
    """An inverted bottleneck: to more features, a depthwise convolution, and back to fewer."""

    width: int
    stride: int
    exec_config: ExecConfig

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Return the sum of what came in, shrunk as far as needed, and of the bottleneck."""
        dtype, hidden = self.exec_config.dtype, EXPANSION * self.width
        y_BHWC = LayerNorm(NORM_EPS, name="ln")(x_BHWC)
        y_BHWC = gelu(nn.Dense(hidden, dtype=dtype, name="expand")(y_BHWC))
        depthwise = DepthwiseConv(3, self.stride, exec_config=self.exec_config, name="conv_dw")
        y_BHWC = nn.Dense(self.width, dtype=dtype, name="project")(gelu(depthwise(y_BHWC)))
        if self.stride > 1:
            x_BHWC = nn.avg_pool(x_BHWC, (3, 3), (2, 2), ((1, 1), (1, 1)), count_include_pad=False)
        if x_BHWC.shape[-1] != self.width:
            x_BHWC = nn.Dense(self.width, dtype=dtype, name="shortcut")(x_BHWC)
        return x_BHWC + y_BHWC


class MBConvStages(nn.Module):
    """A stem, two stages of inverted bottlenecks and a last convolution, which make the rows.

    Attributes:
      widths: features of the two stages; the stem has the first's.
      out_width: features of the rows.
      exec_config: how they are computed.
    """

    widths: tuple[int, ...]
    out_width: int
    exec_config: ExecConfig

    @nn.compact
    def __call__(self, images_BHWC: Float[Array, "B H W 3"]) -> Float[Array, "B L D"]:
        """Return one row for every 16 x 16 pixels, line by line."""
        width, exec_config = self.widths[0], self.exec_config
        x_BHWC = conv3(width, 3, 2, exec_config, "conv1")(images_BHWC)
        x_BHWC = gelu(LayerNorm(NORM_EPS, name="ln_1")(x_BHWC))
        x_BHWC = conv3(width, width, 1, exec_config, "conv2")(x_BHWC)
        for stage, (width, depth) in enumerate(zip(self.widths, DEPTHS, strict=True)):
            for i in range(depth):
                stride = 1 if i else 2
                block = MBConvBlock(width, stride, exec_config, name=f"stages_{stage}_{i}")
                x_BHWC = block(x_BHWC)
        x_BHWC = LayerNorm(NORM_EPS, name="ln_2")(x_BHWC)
        x_BHWC = conv3(self.out_width, width, 2, exec_config, "conv3")(x_BHWC)
        return x_BHWC.reshape(x_BHWC.shape[0], -1, self.out_width)


def mbconv_flops(image_size: int, widths: tuple[int, ...], out_width: int) -> int:
    """Count the operations of the stages for one image, two a multiply-add."""
    side, fan_in = image_size // 2, widths[0]
    total = side**2 * 9 * (3 * fan_in + fan_in**2)
    for width, depth in zip(widths, DEPTHS, strict=True):
        hidden = EXPANSION * width
        for i in range(depth):
            total += side**2 * fan_in * hidden
            side //= 1 if i else 2
            total += side**2 * hidden * (9 + width)
            total += side**2 * fan_in * width * (fan_in != width)
            fan_in = width
    side //= 2
    return 2 * (total + side**2 * 9 * fan_in * out_width)
