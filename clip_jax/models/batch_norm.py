"""Batch norm whose statistics are those of the valid rows of the global batch.

flax's own is the definition. It waits for the other devices three times or more: for the mean, for
the variance about it, and for two sums or more in the backward pass. The one here has the same
values and gradients to rounding and waits once in each pass.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from clip_jax.models.target import Target


class ValidRows(NamedTuple):
    """The rows that statistics are taken of.

    Attributes:
      mask_B111: whether a row is one of them.
      counts_S: how many there are in each part of the batch that a device has, float32.
    """

    mask_B111: Bool[Array, "B 1 1 1"]
    counts_S: Float[Array, " S"]


def valid_rows(valid_B: Bool[Array, " B"] | None, target: Target) -> ValidRows | None:
    """Return the rows that a batch norm's statistics are taken of: the valid ones.

    They are all where none is valid, so that such a batch has a variance at all. None is all.
    """
    if valid_B is None:
        return None
    mask_B = valid_B | ~jnp.any(valid_B)
    shards = part_count(target, len(mask_B))
    counts_S = jnp.sum(split_parts(mask_B, shards, target), axis=1, dtype=jnp.float32)
    return ValidRows(mask_B[:, None, None, None], replicate(counts_S, target))


def all_rows(batch: int, target: Target) -> ValidRows:
    """Return all rows of a batch."""
    rows = valid_rows(jnp.ones(batch, bool), target)
    assert rows is not None
    return rows


def update_running(
    module: nn.Module, mean_C: Float[Array, " C"], var_C: Float[Array, " C"], momentum: float
) -> None:
    """Move the running statistics of a norm towards those of a batch."""
    shape = mean_C.shape
    running_mean = module.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
    running_var = module.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
    if not module.is_initializing():
        for running, newest in ((running_mean, mean_C), (running_var, var_C)):
            running.value = momentum * running.value + (1 - momentum) * newest


class OnePassBatchNorm(nn.Module):
    """Batch norm in training, with the parameters and running statistics of `nn.BatchNorm`.

    Attributes:
      momentum: what the running statistics keep of themselves.
      epsilon: added to the variance.
      dtype: of the result.
      scale_init: initializer of the gain.
      relu: whether a ReLU follows.
      target: the devices that the program is traced for.
    """

    momentum: float
    epsilon: float
    dtype: DTypeLike
    scale_init: nn.initializers.Initializer
    relu: bool
    target: Target

    @nn.compact
    def __call__(self, x_BHWC: Array, row_BWC: Array, rows: ValidRows | None) -> Array:
        """Return the normalized features.

        Args:
          x_BHWC: the features.
          row_BWC: some row of them. As a result of its own it leaves the compiler free to sum the
            features while they are computed.
          rows: the images that statistics are taken of; None is all.
        """
        shape = x_BHWC.shape[-1:]
        scale_C = self.param("scale", self.scale_init, shape)
        bias_C = self.param("bias", nn.initializers.zeros, shape)
        rows = rows or all_rows(len(x_BHWC), self.target)
        features, row_BWC = jax.lax.stop_gradient((x_BHWC, row_BWC))
        mean_C, var_C = batch_statistics(features, row_BWC, rows, self.target)
        update_running(self, mean_C, var_C, self.momentum)
        rstd_C = jax.lax.rsqrt(var_C + self.epsilon)
        spec = _Spec(jnp.dtype(self.dtype), self.relu, self.target)
        return _normalize(spec, x_BHWC, scale_C, bias_C, mean_C, rstd_C, rows)


def batch_statistics(
    x_BHWC: Array, row_BWC: Array, rows: ValidRows, target: Target
) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    """Return mean and variance of each feature over the valid rows, in float32.

    Each device sums its own features and their squares in one pass, about the mean of `row_BWC`,
    one row of each of its images. As a share p of what is summed it lies no further from the mean
    of all than sqrt(1 / p - 1) standard deviations, whatever the data: the squares lose next to no
    digits. Means, and squares about them, are exchanged once and joined exactly (Chan, Golub and
    LeVeque 1979); sums of squares about a value common to all devices would cancel again.
    """
    pixels, width = x_BHWC.shape[1] * x_BHWC.shape[2], x_BHWC.shape[2]
    shards = len(rows.counts_S)

    def split(x: Array) -> Array:
        return split_parts(x, shards, target)

    mask_Sb = split(rows.mask_B111[:, 0, 0, 0])
    # Each device's own, which it knows without the others.
    count_S1 = jnp.maximum(jnp.sum(mask_Sb, axis=1, dtype=jnp.float32), 1)[:, None]
    row_SbWC = split(row_BWC).astype(jnp.float32)
    shift_SC = jnp.sum(row_SbWC, axis=(1, 2), where=mask_Sb[:, :, None, None])
    shift_SC = shift_SC / (count_S1 * width)
    deviation_SbHWC = split(x_BHWC).astype(jnp.float32) - shift_SC[:, None, None, None]
    deviation_SbHWC = jnp.where(mask_Sb[:, :, None, None, None], deviation_SbHWC, 0)
    sums_SC = jnp.sum(deviation_SbHWC, axis=(1, 2, 3))
    mean_SC = sums_SC / (count_S1 * pixels)
    squares_SC = jnp.sum(jnp.square(deviation_SbHWC), axis=(1, 2, 3)) - sums_SC * mean_SC
    return join_moments(shift_SC + mean_SC, squares_SC, rows, pixels, target)


def join_moments(
    mean_SC: Float[Array, "S C"],
    squares_SC: Float[Array, "S C"],
    rows: ValidRows,
    pixels: int,
    target: Target,
) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    """Return mean and variance of all parts' features; the devices exchange theirs once.

    Args:
      mean_SC: of each part's valid rows.
      squares_SC: of their deviations from that, summed.
      rows: the valid ones.
      pixels: of an image.
      target: the devices.
    """
    moments_S2C = jnp.stack([mean_SC, jnp.maximum(squares_SC, 0)], axis=1)

    def join(moments_S2C: Array, counts_S: Array) -> tuple[Array, Array]:
        mean_SC, squares_SC = jnp.moveaxis(moments_S2C, 1, 0)
        count = jnp.sum(counts_S)
        share_S1 = (counts_S / count)[:, None]
        mean_C = jnp.sum(share_S1 * mean_SC, axis=0)
        between_C = jnp.sum(share_S1 * jnp.square(mean_SC - mean_C), axis=0)
        return mean_C, jnp.sum(squares_SC, axis=0) / (count * pixels) + between_C

    if len(moments_S2C) > 1 and target.splits_rows_alone:
        # The compiler alone would split each of the sums and exchange them one after the other.
        return target.map_gathered(join, moments_S2C, rows.counts_S)
    return join(replicate(moments_S2C, target), rows.counts_S)


class _Spec(NamedTuple):
    """What of a norm is known when it is traced."""

    dtype: DTypeLike
    relu: bool
    target: Target


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(
    spec: _Spec,
    x_BHWC: Array,
    scale_C: Array,
    bias_C: Array,
    mean_C: Array,
    rstd_C: Array,
    rows: ValidRows,
) -> Array:
    """Return the features normalized; the gradient is that through the statistics too."""
    del rows
    y_BHWC = (x_BHWC.astype(jnp.float32) - mean_C) * (rstd_C * scale_C) + bias_C
    return (nn.relu(y_BHWC) if spec.relu else y_BHWC).astype(spec.dtype)


def _normalize_forward(spec: _Spec, *args):
    return _normalize(spec, *args), args


def _normalize_backward(spec: _Spec, saved, dy_BHWC: Array):
    """Return the gradients; both sums over rows are exchanged at once."""
    x_BHWC, scale_C, bias_C, mean_C, rstd_C, rows = saved
    centered_BHWC = x_BHWC.astype(jnp.float32) - mean_C
    dy_BHWC = dy_BHWC.astype(jnp.float32)
    if spec.relu:
        is_positive = centered_BHWC * (rstd_C * scale_C) + bias_C > 0
        dy_BHWC = jnp.where(is_positive, dy_BHWC, 0)
    shards = len(rows.counts_S)

    def total(x_BHWC: Array) -> Array:
        return jnp.sum(split_parts(x_BHWC, shards, spec.target), axis=(1, 2, 3))

    sums_S2C = jnp.stack([total(dy_BHWC), total(dy_BHWC * centered_BHWC)], axis=1)
    dbias_C, dscale_C = jnp.sum(sums_S2C, axis=0)
    dscale_C = dscale_C * rstd_C
    size = jnp.sum(rows.counts_S) * (x_BHWC.shape[1] * x_BHWC.shape[2])
    shared_BHWC = (dbias_C + centered_BHWC * (rstd_C * dscale_C)) / size
    dx_BHWC = (scale_C * rstd_C) * (dy_BHWC - jnp.where(rows.mask_B111, shared_BHWC, 0))
    return dx_BHWC.astype(x_BHWC.dtype), dscale_C, dbias_C, None, None, None


_normalize.defvjp(_normalize_forward, _normalize_backward)


def part_count(target: Target, batch: int) -> int:
    """Return the number of parts of a batch; 1 where the devices do not split it evenly."""
    return target.batch_shards if batch % target.batch_shards == 0 else 1


def split_parts(x: Array, shards: int, target: Target) -> Array:
    """Reshape [B, ...] to [S, B / S, ...], each device with its own part."""
    x = x.reshape(shards, -1, *x.shape[1:])
    return target.split_rows(x) if shards > 1 else x


def replicate(x_S: Array, target: Target) -> Array:
    """Give every device all parts of an array."""
    if target.mesh is None:
        return x_S
    spec = P(*[None] * min(x_S.ndim, 2), *[P.UNCONSTRAINED] * (x_S.ndim - 2))
    return jax.lax.with_sharding_constraint(x_S, NamedSharding(target.mesh, spec))
