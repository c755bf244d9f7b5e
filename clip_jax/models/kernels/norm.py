"""Layer normalization of a residual stream, forward and backward, each one pass over memory.

The forward kernel returns the normalized rows. The backward kernel adds the gradient that goes
around the norm and sums those of gain and bias, which the compiler's own form reads the rows again
for.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from clip_jax.models.kernels.forms import NormForm, note_form
from clip_jax.models.kernels.vmem import segments_per_program, vmem_limit
from clip_jax.models.target import Target


@dataclasses.dataclass(frozen=True)
class Norm:
    """A layer norm: its epsilon, and the devices."""

    epsilon: float
    target: Target


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def residual_norm(
    x_SRD: Float[Array, "S R D"],
    scale_D: Float[Array, " D"],
    bias_D: Float[Array, " D"],
    norm: Norm,
) -> tuple[Float[Array, "S R D"], Float[Array, "S R D"]]:
    """Return `x_SRD` itself and its layer norm, computed in float32, in its dtype.

    Take the first where the residual connection goes on: its gradient is then added by the
    kernel.
    """
    (y_SRD,) = _call(_forward_kernel, norm, (x_SRD,), (scale_D, bias_D))
    return x_SRD, y_SRD


def _forward(x_SRD, scale_D, bias_D, norm: Norm):
    return residual_norm(x_SRD, scale_D, bias_D, norm), (x_SRD, scale_D)


def _backward(norm: Norm, residuals, gradients):
    x_SRD, scale_D = residuals
    dx_SRD, dscale_s1D, dbias_s1D = _call(
        _backward_kernel, norm, (x_SRD, *gradients), (scale_D,), sums=True
    )
    dscale_D, dbias_D = jnp.sum(dscale_s1D, (0, 1)), jnp.sum(dbias_s1D, (0, 1))
    return dx_SRD, dscale_D.astype(scale_D.dtype), dbias_D.astype(scale_D.dtype)


residual_norm.defvjp(_forward, _backward)


def _call(
    kernel: Any, norm: Norm, rows: tuple[Array, ...], whole: tuple[Array, ...], *, sums=False
) -> tuple[Array, ...]:
    """Run a kernel on each device's rows; with `sums` it also returns two of [programs, 1, D]."""

    def run(*arrays: Array) -> tuple[Array, ...]:
        segments, length, width = arrays[0].shape
        taken = segments_per_program(segments, length)
        note_form(NormForm(taken, length, width, norm.epsilon))
        block = pl.BlockSpec((taken, length, width), lambda s: (s, 0, 0))
        sums_block = pl.BlockSpec((1, 1, width), lambda s: (s, 0, 0))
        sums_shape = jax.ShapeDtypeStruct((segments // taken, 1, width), jnp.float32)
        return pl.pallas_call(
            functools.partial(kernel, epsilon=norm.epsilon),
            grid=(segments // taken,),
            in_specs=[block] * len(rows)
            + [pl.BlockSpec((1, width), lambda s: (0, 0))] * len(whole),
            out_specs=[block] + [sums_block, sums_block] * sums,
            out_shape=[jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)]
            + [sums_shape, sums_shape] * sums,
            interpret=norm.target.interpret,
            name="norm_backward" if sums else "norm_forward",
            compiler_params=pltpu.CompilerParams(
                vmem_limit_bytes=vmem_limit(norm.target.generation)
            ),
        )(*arrays)

    return tuple(norm.target.map_rows(run, rows, tuple(x[None] for x in whole)))


def _forward_kernel(x, scale, bias, y, *, epsilon: float) -> None:
    for segment in range(x.shape[0]):
        normalized, _ = _normalize(x[segment], epsilon)
        y[segment] = (normalized * scale[...] + bias[...]).astype(y.dtype)


def _backward_kernel(x, around, dy, scale, dx, dscale, dbias, *, epsilon: float) -> None:
    dscale_1D = dbias_1D = jnp.zeros(scale.shape, jnp.float32)
    for segment in range(x.shape[0]):
        normalized, inverse = _normalize(x[segment], epsilon)
        d = dy[segment].astype(jnp.float32)
        dscale_1D += jnp.sum(d * normalized, 0, keepdims=True)
        dbias_1D += jnp.sum(d, 0, keepdims=True)
        d = d * scale[...]
        d = d - _mean(d) - normalized * _mean(d * normalized)
        dx[segment] = (around[segment].astype(jnp.float32) + inverse * d).astype(dx.dtype)
    dscale[0], dbias[0] = dscale_1D, dbias_1D


def _normalize(x_LD: Array, epsilon: float) -> tuple[Array, Array]:
    """Return normalized rows and the inverse of their deviation, in two passes."""
    x_LD = x_LD.astype(jnp.float32)
    deviation = x_LD - _mean(x_LD)
    inverse = lax.rsqrt(_mean(deviation * deviation) + epsilon)
    return deviation * inverse, inverse


def _mean(x_LD: Array) -> Array:
    return jnp.mean(x_LD, -1, keepdims=True)
