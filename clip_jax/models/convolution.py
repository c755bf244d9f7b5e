"""Convolution and batch norm with PyTorch's padding, initialization and momentum."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from clip_jax.models.batch_norm import OnePassBatchNorm, ValidRows
from clip_jax.models.execution import ExecConfig
from clip_jax.models.layers import torch_uniform
from clip_jax.models.product_norm import ProductBatchNorm

MOMENTUM = 0.9
EPSILON = 1e-5


def conv(
    features: int, size: int, fan_in: int, *, stride: int = 1, dtype: DTypeLike, name: str
) -> nn.Conv:
    """Return a convolution without bias of an input of `fan_in` features.

    It is padded as PyTorch does (flax's SAME pads 0, 1 at stride 2).
    """
    pad = size // 2
    return nn.Conv(
        features,
        (size, size),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=False,
        kernel_init=torch_uniform(fan_in * size * size),
        dtype=dtype,
        name=name,
    )


def normalized(
    conv: nn.Conv,
    x_BHWC: Array,
    rows: ValidRows | None,
    *,
    train: bool,
    exec_config: ExecConfig,
    zero_scale: bool = False,
    relu: bool = False,
    name: str,
) -> Array:
    """Return a convolution's features after a batch norm of this name, and a ReLU if asked for.

    Epsilon and momentum are PyTorch's (0.1 there is 0.9 here). With `train` the statistics are
    those of `rows` (`valid_rows` makes them, so that an image that could not be read has no part in
    them); under one jitted step over a mesh, those of the global batch. The running variance is
    the biased one, where PyTorch keeps the unbiased: n / (n - 1) apart.
    """
    init = nn.initializers.zeros if zero_scale else nn.initializers.ones
    dtype, target = exec_config.dtype, exec_config.target
    if train and not relu and _fuses(conv, x_BHWC, exec_config):
        kernel_IO = conv.variables["params"]["kernel"][0, 0]
        product_norm = ProductBatchNorm(MOMENTUM, EPSILON, dtype, init, target, name=name)
        return product_norm(x_BHWC, kernel_IO, rows)
    y_BHWC = conv(x_BHWC)
    if train and (target.platform != "cpu" or target.mesh is not None):
        norm = OnePassBatchNorm(MOMENTUM, EPSILON, dtype, init, relu, target, name=name)
        return norm(y_BHWC, middle_row(conv, x_BHWC), rows)
    plain_norm = nn.BatchNorm(
        use_running_average=not train,
        momentum=MOMENTUM,
        epsilon=EPSILON,
        dtype=dtype,
        # E[x^2] - E[x]^2 would cancel where a channel's mean is large.
        use_fast_variance=False,
        scale_init=init,
        name=name,
    )
    y_BHWC = plain_norm(y_BHWC, mask=None if rows is None else rows.mask_B111)
    return nn.relu(y_BHWC) if relu else y_BHWC


def _fuses(conv: nn.Conv, x_BHWC: Array, exec_config: ExecConfig) -> bool:
    """Return whether a convolution is computed with its norm as one.

    On accelerators, which wait for their memory there; parameters are drawn by the modules.
    """
    layer: Any = conv  # flax allows sizes of other forms too
    is_product = set(layer.kernel_size) == {1} == set(layer.strides)
    is_wider = layer.features > x_BHWC.shape[-1]
    is_narrow_dtype = jnp.dtype(exec_config.dtype).itemsize == 2
    runs = exec_config.target.platform != "cpu" and not conv.is_initializing()
    return is_product and is_wider and is_narrow_dtype and runs


def middle_row(conv: nn.Conv, x_BHWC: Array) -> Array:
    """Return the middle row [B, W, C] of a convolution's result, computed from what it reads."""
    layer: Any = conv  # flax allows sizes of other forms too
    size, stride, pad = layer.kernel_size[0], layer.strides[0], layer.padding[0][0]
    height = (x_BHWC.shape[1] + 2 * pad - size) // stride + 1
    # With padding the first row of a strip is another one: the second is read.
    row = min(pad, height // 2, 1)
    start = stride * (height // 2 - row)
    return conv(x_BHWC[:, start : start + stride * row + size - pad])[:, row]
