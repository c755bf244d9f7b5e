"""Layer normalization in float32, and a form of it whose gradients are made for GPUs."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from clip_jax.models.row_sums import sum_rows_first
from clip_jax.models.target import ONE_CPU, Target


def layer_norm(
    x: Array, scale_D: Float[Array, " D"], bias_D: Float[Array, " D"], epsilon: float
) -> Array:
    """Return layer normalization computed in float32, in the input's dtype."""
    # In two passes: flax's fast variance, E[x^2] - E[x]^2, cancels where the mean is large.
    x32 = x.astype(jnp.float32)
    deviation = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(deviation), axis=-1, keepdims=True)
    # In this order the factor of a row stays one number until it is multiplied.
    y = deviation * jax.lax.rsqrt(variance + epsilon) * scale_D + bias_D
    return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm_for_gpu(
    x: Array,
    scale_D: Float[Array, " D"],
    bias_D: Float[Array, " D"],
    epsilon: float,
    target: Target = ONE_CPU,
) -> Array:
    """Return `layer_norm`, whose gradients read the rows twice and write no float32 array.

    JAX's own derivative multiplies rows and gradient once for the sums over features and the sums
    over rows: XLA writes that product to memory, float32 and as large as the rows, and reads it
    again. Here each of the two makes it for itself.
    """
    return layer_norm(x, scale_D, bias_D, epsilon)


def _forward(x: Array, scale_D: Array, bias_D: Array, epsilon: float, target: Target):
    return layer_norm(x, scale_D, bias_D, epsilon), (x, scale_D)


def _backward(epsilon: float, target: Target, saved: tuple[Array, Array], dy: Array):
    x, scale_D = saved
    mean, factor = _mean_and_factor(x, epsilon)
    normal = (x.astype(jnp.float32) - mean) * factor
    dnormal = dy.astype(jnp.float32) * scale_D
    mean_product = jnp.mean(dnormal * normal, axis=-1, keepdims=True)
    dx = factor * (dnormal - jnp.mean(dnormal, axis=-1, keepdims=True) - normal * mean_product)
    # Behind the barriers the compiler does not see that the products are the same, and the two
    # numbers of a row are in memory before the sums over rows are taken.
    x, dy = lax.optimization_barrier((x, dy))

    def parameter_gradients(x: Array, dy: Array) -> tuple[Array, Array]:
        mean, factor = lax.optimization_barrier(_mean_and_factor(x, epsilon))
        dy32, rows = dy.astype(jnp.float32), tuple(range(x.ndim - 1))
        dscale_D = jnp.sum(dy32 * ((x.astype(jnp.float32) - mean) * factor), rows)
        return dscale_D, jnp.sum(dy32, rows)

    dparams, dx = sum_rows_first(target, parameter_gradients, (x, dy), dx.astype(x.dtype))
    return dx, *(d.astype(scale_D.dtype) for d in dparams)


layer_norm_for_gpu.defvjp(_forward, _backward)


def _mean_and_factor(x: Array, epsilon: float) -> tuple[Array, Array]:
    """Return each row's mean and the reciprocal of its standard deviation, float32 [..., 1]."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x32 - mean), axis=-1, keepdims=True)
    return mean, jax.lax.rsqrt(variance + epsilon)
