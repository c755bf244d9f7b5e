"""A 1x1 convolution with the batch norm behind it, computed as one.

Its outputs are products of a matrix and its inputs, so that their mean and variance follow from
the inputs' mean and covariance, and the gradients from one product of inputs and cotangents. Where
there are more outputs than inputs, that reads and writes far less: the outputs are normalized while
they are computed, before they are written, and not read again in either pass.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from clip_jax.models.batch_norm import (
    ValidRows,
    all_rows,
    join_moments,
    split_parts,
    update_running,
)
from clip_jax.models.target import Target


class ProductBatchNorm(nn.Module):
    """Batch norm in training of a product, with the parameters and statistics of `nn.BatchNorm`.

    Attributes:
      momentum: what the running statistics keep of themselves.
      epsilon: added to the variance.
      dtype: of the result.
      scale_init: initializer of the gain.
      target: the devices that the program is traced for.
    """

    momentum: float
    epsilon: float
    dtype: DTypeLike
    scale_init: nn.initializers.Initializer
    target: Target

    @nn.compact
    def __call__(
        self, x_BHWI: Array, kernel_IO: Float[Array, "I O"], rows: ValidRows | None
    ) -> Array:
        """Return the normalized features of `x_BHWI @ kernel_IO`; `rows` are the valid ones."""
        shape = kernel_IO.shape[1:]
        scale_O = self.param("scale", self.scale_init, shape)
        bias_O = self.param("bias", nn.initializers.zeros, shape)
        spec = _Spec(jnp.dtype(self.dtype), self.epsilon, self.target)
        rows = rows or all_rows(len(x_BHWI), self.target)
        y_BHWO, mean_O, var_O = _normalized_product(spec, x_BHWI, kernel_IO, scale_O, bias_O, rows)
        update_running(self, mean_O, var_O, self.momentum)
        return y_BHWO


class _Spec(NamedTuple):
    """What of a norm is known when it is traced."""

    dtype: DTypeLike
    epsilon: float
    target: Target


class _Saved(NamedTuple):
    """What stays between the passes.

    Attributes:
      sum_SI: of the inputs, over each part's valid rows.
      moments_SIO: of inputs and outputs about their means, summed over the same.
      mean_SO: of the outputs there.
    """

    x_BHWI: Array
    kernel_IO: Array
    scale_O: Array
    mean_O: Array
    rstd_O: Array
    rows: ValidRows
    sum_SI: Array
    moments_SIO: Array
    mean_SO: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalized_product(
    spec: _Spec,
    x_BHWI: Array,
    kernel_IO: Array,
    scale_O: Array,
    bias_O: Array,
    rows: ValidRows,
) -> tuple[Array, Array, Array]:
    """Return the normalized features, their mean and their variance; the latter are constants."""
    return _forward(spec, x_BHWI, kernel_IO, scale_O, bias_O, rows)[0]


def _forward(spec: _Spec, x_BHWI, kernel_IO, scale_O, bias_O, rows: ValidRows):
    shards, pixels = len(rows.counts_S), x_BHWI.shape[1] * x_BHWI.shape[2]
    x_SbHWI = split_parts(x_BHWI, shards, spec.target)
    mask_Sb111 = split_parts(rows.mask_B111, shards, spec.target)
    valid_SbHWI = jnp.where(mask_Sb111, x_SbHWI, 0)
    gram_SII = _product("sbhwi,sbhwj->sij", x_SbHWI, valid_SbHWI)
    ones = jnp.ones((*x_SbHWI.shape[:-1], 8), x_SbHWI.dtype)
    sum_SI = _product("sbhwk,sbhwi->ski", ones, valid_SbHWI)[:, 0]
    size_S1 = jnp.maximum(jnp.sum(mask_Sb111, axis=(1, 2, 3, 4)), 1)[:, None] * float(pixels)
    kernel = kernel_IO.astype(spec.dtype)
    exact_IO = kernel.astype(jnp.float32)
    mean_SO = _exact("si,io->so", sum_SI, exact_IO) / size_S1
    # About the inputs' mean, before anything else can cancel.
    centered_SII = gram_SII - sum_SI[:, :, None] * (sum_SI / size_S1)[:, None]
    moments_SIO = _exact("sij,jo->sio", centered_SII, exact_IO)
    squares_SO = jnp.sum(exact_IO * moments_SIO, axis=1)
    mean_O, var_O = join_moments(mean_SO, squares_SO, rows, pixels, spec.target)
    rstd_O = lax.rsqrt(var_O + spec.epsilon)
    y_BHWO = _product("bhwi,io->bhwo", x_BHWI, kernel)
    y_BHWO = (y_BHWO - mean_O) * (rstd_O * scale_O) + bias_O
    saved = _Saved(x_BHWI, kernel_IO, scale_O, mean_O, rstd_O, rows, sum_SI, moments_SIO, mean_SO)
    return (y_BHWO.astype(spec.dtype), mean_O, var_O), saved


def _backward(spec: _Spec, saved: _Saved, cotangents: Any):
    """Return the gradients; of a feature, both sums over rows are exchanged at once.

    The cotangent of the product y is a (d - mask (p + q (y - mean))), with numbers a, p and q of a
    feature, and y is linear in the inputs x. So the gradient of the kernel comes from x^T d and
    x^T x, and that of the inputs from d and x: y is not there.
    """
    x_BHWI, kernel_IO, scale_O, mean_O, rstd_O, rows, *sums = saved
    sum_SI, moments_SIO, mean_SO = sums
    d_BHWO = cotangents[0]
    shards, pixels = len(rows.counts_S), x_BHWI.shape[1] * x_BHWI.shape[2]
    x_SbHWI, d_SbHWO = (split_parts(x, shards, spec.target) for x in (x_BHWI, d_BHWO))
    products_SIO = _product("sbhwi,sbhwo->sio", x_SbHWI, d_SbHWO)
    exact_IO = kernel_IO.astype(spec.dtype).astype(jnp.float32)
    sums_S2O = jnp.stack(
        [
            jnp.sum(d_SbHWO.astype(jnp.float32), axis=(1, 2, 3)),
            jnp.sum(products_SIO * exact_IO, axis=1),
        ],
        axis=1,
    )
    dbias_O, product_O = jnp.sum(sums_S2O, axis=0)
    dscale_O = rstd_O * (product_O - mean_O * dbias_O)
    size = jnp.sum(rows.counts_S) * pixels
    a_O = scale_O * rstd_O
    p_O, q_O = dbias_O / size, rstd_O * dscale_O / size
    # The sum of x (p + q (y - mean)): y and mean of all parts, about those of each.
    shared_SO = p_O + q_O * (mean_SO - mean_O)
    through_SIO = sum_SI[:, :, None] * shared_SO[:, None] + moments_SIO * q_O
    dkernel_IO = jnp.sum(products_SIO - through_SIO, axis=0) * a_O
    back_OI = (exact_IO * a_O).T
    # What goes through the statistics: of the inputs an affine function.
    slope_II = _exact("io,oj->ij", exact_IO * q_O, back_OI).astype(spec.dtype)
    shared_BHWI = _product("bhwi,ij->bhwj", x_BHWI, slope_II) + (p_O - q_O * mean_O) @ back_OI
    # Small beside the rest, and rounded: float32 would be written to memory and read again.
    shared_BHWI = jnp.where(rows.mask_B111, shared_BHWI, 0).astype(spec.dtype)
    dx_BHWI = _product("bhwo,oi->bhwi", d_BHWO, back_OI.astype(spec.dtype)) - shared_BHWI
    return dx_BHWI.astype(x_BHWI.dtype), dkernel_IO, dscale_O, dbias_O, None


_normalized_product.defvjp(_forward, _backward)


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _exact(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, precision=lax.Precision.HIGHEST)
