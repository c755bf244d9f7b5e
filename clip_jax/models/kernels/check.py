"""A kernel of this chip against the plain form, in values and gradients, on a small input."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from clip_jax.models.attention import attend_packed
from clip_jax.models.kernels.attention import Heads, short_attention
from clip_jax.models.kernels.forms import AttentionForm, KernelForm, NormForm
from clip_jax.models.kernels.norm import Norm, residual_norm
from clip_jax.models.layer_norm import layer_norm
from clip_jax.models.target import Target

PROGRAMS = 5
"""Of the small input. A prime above `MAX_SEGMENTS`: so a program takes what the form's takes."""
ALLOWED = 2.0
"""Times the plain form's own error in bfloat16; measured in the interpreter it is 0.7 to 1.0."""


def kernel_error(form: KernelForm, target: Target) -> float:
    """Return how far a kernel is from the plain form, computed on the first local device.

    Returns:
      The largest error of a result or gradient, in norm, over that of the plain form in bfloat16,
      both against float32. About 1 is rounding, more than `ALLOWED` is not.
    """
    if isinstance(form, NormForm):
        return _norm_error(form, target.alone)
    return _attention_error(form, target.alone)


def _attention_error(form: AttentionForm, target: Target) -> float:
    packing = dataclasses.replace(form.packing, batch=PROGRAMS * form.packing.batch)
    sequences, length, width = packing.batch, packing.length, form.heads * form.head_size
    q, k, v, dy, bias = _draw((sequences, length, width), 4, (3, width))
    positions_SR = None
    if packing.is_ragged:
        # Sequences of 1, 2, ... rows.
        positions_SR = jnp.arange(length) % (1 + jnp.arange(sequences)[:, None])
    spec = Heads(form.heads, form.is_causal, target, packing)

    def attend(q: Array, k: Array, v: Array, bias_3D: Array) -> Array:
        qkv_ND = packing.flatten(jnp.concatenate((q, k, v), -1))
        y_SRD = short_attention(packing.segments(qkv_ND), bias_3D, spec, positions_SR)
        return packing.unflatten(y_SRD.reshape(-1, width))

    def plain(q: Array, k: Array, v: Array, bias_3D: Array) -> Array:
        return _plain_attention(q, k, v, bias_3D, spec, positions_SR)

    return _error(attend, plain, (q, k, v, bias), dy)


def _norm_error(form: NormForm, target: Target) -> float:
    shape = (PROGRAMS * form.segments, form.rows, form.width)
    x, around, dx, scale, shift = _draw(shape, 3, (form.width,), (form.width,))
    return _error(
        lambda x, s, b: residual_norm(x, s, b, Norm(form.epsilon, target)),
        lambda x, s, b: (x, layer_norm(x, s, b, form.epsilon)),
        (x, 1 + scale, shift),
        (around, dx),
    )


def _draw(rows: tuple[int, ...], count: int, *others: tuple[int, ...]) -> list[Array]:
    """Return `count` bfloat16 arrays of rows, and float32 arrays of the other shapes."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(rows), jnp.bfloat16) for _ in range(count)]
    return arrays + [jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32) for shape in others]


def _plain_attention(
    q: Array, k: Array, v: Array, bias_3D: Array, heads: Heads, positions_SR: Array | None
) -> Array:
    q, k, v = (
        (x + bias_3D[i].astype(x.dtype)).reshape(*x.shape[:2], heads.number, -1)
        for i, x in enumerate((q, k, v))
    )
    if positions_SR is not None:
        y = attend_packed(q, k, v, positions_SR)
    else:
        y = jax.nn.dot_product_attention(q, k, v, is_causal=heads.is_causal, implementation="xla")
    return y.reshape(*y.shape[:2], -1)


def _error(
    kernel: Callable[..., Any], plain: Callable[..., Any], arrays: tuple[Array, ...], weights: Any
) -> float:
    """Return the largest error of a kernel over that of the plain form, both in bfloat16."""

    def run(form: Callable[..., Any], arrays: Any, weights: Any) -> list[np.ndarray]:
        @jax.jit
        def results(arrays: Any, weights: Any) -> Any:
            y, pull = jax.vjp(form, *arrays)
            return y, pull(weights)

        return [np.asarray(a, np.float64) for a in jax.tree.leaves(results(arrays, weights))]

    in_float32 = jax.tree.map(lambda a: a.astype(jnp.float32), (arrays, weights))
    with jax.default_matmul_precision("highest"):
        exact = run(plain, *in_float32)
    errors = []
    for got, near, want in zip(
        run(kernel, arrays, weights), run(plain, arrays, weights), exact, strict=True
    ):
        floor = 1e-3 * np.linalg.norm(want)  # what is exact in the plain form
        errors.append(np.linalg.norm(got - want) / (np.linalg.norm(near - want) + floor))
    return float(np.max(errors))
