"""Convolution and batch norm with PyTorch's padding, initialization and momentum."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool

from clip_jax.models.layers import torch_uniform


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


def statistics_mask(valid_B: Bool[Array, " B"] | None) -> Bool[Array, "B 1 1 1"] | None:
    """Return the mask of the images that a batch norm's statistics are taken of: the valid ones.

    It holds all where none is valid, so that such a batch has a variance at all.
    """
    if valid_B is None:
        return None
    return (valid_B | ~jnp.any(valid_B))[:, None, None, None]


def batch_norm(
    train: bool, *, zero_scale: bool = False, dtype: DTypeLike, name: str
) -> nn.BatchNorm:
    """Return a batch norm with PyTorch's epsilon and momentum (0.1 there is 0.9 here).

    Under one jitted step over a mesh the statistics are those of the global batch; call it with
    `mask=statistics_mask(valid_B)`, so that an image that could not be read has no part in them.
    The running variance is the biased one, where PyTorch keeps the unbiased: n / (n - 1) apart.
    """
    init = nn.initializers.zeros if zero_scale else nn.initializers.ones
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
        # E[x^2] - E[x]^2 would cancel where a channel's mean is large.
        use_fast_variance=False,
        scale_init=init,
        name=name,
    )
