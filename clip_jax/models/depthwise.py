"""Convolutions of each channel alone."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.models.execution import ExecConfig
from clip_jax.models.layers import torch_uniform


class DepthwiseConv(nn.Module):
    """A convolution of each channel with a kernel of its own, zeros around the features.

    Attributes:
      size: side of the kernel, odd.
      stride: of the places that are kept.
      use_bias: a number is added to each channel.
      exec_config: how it is computed.
      multiplier: channels that come of each.
    """

    size: int
    stride: int = 1
    use_bias: bool = True
    exec_config: ExecConfig = ExecConfig()
    multiplier: int = 1

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Return the features of each channel."""
        width = x_BHWC.shape[-1] * self.multiplier
        init = torch_uniform(self.size**2)
        kernel = self.param("kernel", init, (self.size, self.size, 1, width))
        x_BHWC = x_BHWC.astype(self.exec_config.dtype)
        is_cpu = self.exec_config.target.platform == "cpu"
        convolve = separate_sum if is_cpu else grouped_conv
        y_BHWC = convolve(x_BHWC, kernel.astype(x_BHWC.dtype), self.stride)
        if self.use_bias:
            bias_D = self.param("bias", nn.initializers.zeros, (width,))
            y_BHWC = y_BHWC + bias_D.astype(y_BHWC.dtype)
        return y_BHWC


def grouped_conv(x_BHWC: Array, kernel: Float[Array, "k k 1 D"], stride: int) -> Array:
    """Return the convolution as XLA has it: the definition."""
    pad = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x_BHWC,
        kernel,
        (stride, stride),
        ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x_BHWC.shape[-1],
    )


def separate_sum(x_BHWC: Array, kernel: Float[Array, "k k 1 D"], stride: int) -> Array:
    """Return the convolution as a sum in a loop of its own, which no other is merged with.

    Else a CPU's compiler computes it anew wherever its result is read: for each of the nine places
    of the next convolution, and for mean, variance and result of the next norm. It drops barriers
    before it merges loops, and merges nothing with the branches of a condition that it does not
    know. Both branches are the convolution. A program for any number of images, which is exported,
    has the plain sum: other compilers read it.
    """
    if not all(isinstance(n, int) for n in x_BHWC.shape):
        return shifted_sum(x_BHWC, kernel, stride)
    return jax.lax.cond(
        jnp.isfinite(kernel[0, 0, 0, 0]),
        lambda x, kernel: shifted_sum(x, kernel, stride),
        lambda x, kernel: grouped_conv(x, kernel, stride),
        x_BHWC,
        kernel,
    )


def shifted_sum(x_BHWC: Array, kernel: Float[Array, "k k 1 D"], stride: int) -> Array:
    """Return the same as a sum of shifted features, which a CPU's compiler fuses into one loop.

    It has no library for grouped convolutions, and its own loop is many times as slow.
    """
    size, pad = kernel.shape[0], kernel.shape[0] // 2
    # One after the other, the channels that come of one.
    x_BHWC = jnp.repeat(x_BHWC, kernel.shape[-1] // x_BHWC.shape[-1], axis=-1)
    height, columns = (math.ceil(n / stride) for n in x_BHWC.shape[1:3])
    padded = jnp.pad(x_BHWC, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    total = jnp.zeros((), x_BHWC.dtype)
    for i in range(size):
        for j in range(size):
            rows = slice(i, i + stride * (height - 1) + 1, stride)
            places = slice(j, j + stride * (columns - 1) + 1, stride)
            total = total + padded[:, rows, places] * kernel[i, j, 0]
    return total
