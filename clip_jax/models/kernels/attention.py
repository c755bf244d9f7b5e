"""Attention over short sequences, held whole in fast memory: forward and backward.

One program takes one segment of rows (or a few short ones) and all of its heads; a segment is one
sequence or several, see `models.packing`. Logits are held as
[keys, queries], so that the softmax reduces over sublanes, which costs additions, and not over
lanes. Heads of 64 features lie two in a register of 128 lanes. The probabilities never leave fast
memory: the backward kernel computes them again from queries and keys.

The biases of the three projections are added inside, and their gradients summed inside: summing
the three gradients over the batch would take as long as the forward kernel.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from clip_jax.models.kernels.forms import AttentionForm, note_form
from clip_jax.models.kernels.vmem import segments_per_program, vmem_limit
from clip_jax.models.packing import HIDDEN, Packing
from clip_jax.models.target import Target

reciprocal: Callable[[Array], Array] = getattr(pltpu, "reciprocal", None) or pl.reciprocal
"""Pallas's, which jax 0.11 has moved."""
LANES = 128
AT_ONCE = 2
"""Registers' widths that one round of the loop over heads works on."""

ROWS_BY_ROWS = (((1,), (1,)), ((), ()))
MATRICES = (((1,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Heads:
    """The shape of an attention.

    Attributes:
      number: of heads; all features of a row are these, one head after the other.
      is_causal: a query sees the keys up to its own position.
      target: the devices.
      packing: the place of the sequences in the rows; None is one sequence a segment. A ragged
        one is causal.
    """

    number: int
    is_causal: bool
    target: Target
    packing: Packing | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def short_attention(
    qkv_SRE: Float[Array, "S R E"],
    bias_3D: Float[Array, "3 D"],
    heads: Heads,
    positions_SR: Int[Array, "S R"] | None = None,
) -> Float[Array, "S R D"]:
    """Return softmax attention of q, k and v, each with its row of `bias_3D` added.

    They lie side by side in `qkv_SRE`, as one matrix product makes them. Logits, softmax and sums
    are float32; probabilities are rounded to the inputs' dtype before they multiply the values.
    `positions_SR`: of ragged packing, the place of every row in its sequence.
    """
    return _call(_forward_kernel, heads, (qkv_SRE,), positions_SR, bias_3D, outputs=1)[0]


def _forward(qkv_SRE, bias_3D, heads: Heads, positions_SR):
    y_SRD = short_attention(qkv_SRE, bias_3D, heads, positions_SR)
    return y_SRD, (qkv_SRE, bias_3D, positions_SR)


def _backward(heads: Heads, residuals, dy_SRD):
    qkv_SRE, bias_3D, positions_SR = residuals
    dqkv_SRE, dbias_s3D = _call(
        _backward_kernel, heads, (qkv_SRE, dy_SRD), positions_SR, bias_3D, outputs=3, sums=True
    )
    return dqkv_SRE, jnp.sum(dbias_s3D, 0).astype(bias_3D.dtype), None


short_attention.defvjp(_forward, _backward)


def _call(
    kernel: Any,
    heads: Heads,
    rows: tuple[Array, ...],
    positions_SR: Array | None,
    bias_3D: Array,
    *,
    outputs: int,
    sums: bool = False,
) -> tuple[Array, ...]:
    """Run a kernel on each device's rows, whose result is `outputs` times as wide as the stream.

    With `sums` it also returns float32 [programs, 3, D].
    """
    width = bias_3D.shape[1]
    positions = () if positions_SR is None else (positions_SR[:, None],)

    def run(*arrays: Array) -> tuple[Array, ...]:
        segments, length, _ = arrays[0].shape
        taken = segments_per_program(segments, length)
        note_form(_form(heads, taken, length, width))

        def block(width: int) -> pl.BlockSpec:
            return pl.BlockSpec((taken, length, width), lambda s: (s, 0, 0))

        sums_block = pl.BlockSpec((1, 3, width), lambda s: (s, 0, 0))
        shape = jax.ShapeDtypeStruct((segments, length, outputs * width), arrays[0].dtype)
        sums_shape = jax.ShapeDtypeStruct((segments // taken, 3, width), jnp.float32)
        return pl.pallas_call(
            functools.partial(kernel, heads=heads),
            grid=(segments // taken,),
            in_specs=[block(x.shape[-1]) for x in rows]
            + [pl.BlockSpec((taken, 1, length), lambda s: (s, 0, 0)) for _ in positions]
            + [pl.BlockSpec((3, width), lambda s: (0, 0))],
            out_specs=[block(outputs * width)] + [sums_block] * sums,
            out_shape=[shape] + [sums_shape] * sums,
            interpret=heads.target.interpret,
            name="attention_backward" if sums else "attention_forward",
            compiler_params=pltpu.CompilerParams(
                vmem_limit_bytes=vmem_limit(heads.target.generation)
            ),
        )(*arrays)

    whole = (bias_3D.astype(rows[0].dtype),)
    return tuple(heads.target.map_rows(run, (*rows, *positions), whole))


def _form(heads: Heads, segments: int, rows: int, width: int) -> AttentionForm:
    """Return the form of programs that take so many segments."""
    packing = heads.packing or Packing(segments, rows, rows)
    packing = dataclasses.replace(packing, batch=segments * packing.sequences)
    return AttentionForm(heads.number, width // heads.number, heads.is_causal, packing)


def _forward_kernel(qkv, *refs, heads: Heads) -> None:
    *positions, bias, y = refs
    scale = (y.shape[-1] // heads.number) ** -0.5
    hidden = _hidden_of_segments(y.shape[0], y.shape[1], heads, positions)

    def attend(start: Any, columns: Columns) -> None:
        for segment in range(y.shape[0]):
            qs, ks, vs = _with_bias(qkv, bias, segment, start, columns)
            v_T = vs.T
            y_T = []
            for h in columns.heads:
                p, total = _unnormalized(qs[:, h], ks[:, h], scale, hidden[segment])
                y_T.append(_dot(v_T[h], p.astype(y.dtype), MATRICES) * reciprocal(total))
            y[segment, :, pl.ds(start, columns.size)] = _join(y_T, 0).astype(y.dtype).T

    _for_columns(attend, y.shape[-1], heads.number)


def _backward_kernel(qkv, dy, *refs, heads: Heads) -> None:
    *positions, bias, dqkv, dbias = refs
    dtype, width = dy.dtype, dy.shape[-1]
    scale = (width // heads.number) ** -0.5
    hidden = _hidden_of_segments(dy.shape[0], dy.shape[1], heads, positions)

    def attend(start: Any, columns: Columns) -> None:
        sums = [jnp.zeros((1, columns.size), jnp.float32)] * 3
        for segment in range(dy.shape[0]):
            qs, ks, vs = _with_bias(qkv, bias, segment, start, columns)
            dys = dy[segment, :, pl.ds(start, columns.size)]
            k_T = ks.T
            dq_T, dk_heads, dv_heads = [], [], []
            for h in columns.heads:
                p, total = _unnormalized(qs[:, h], ks[:, h], scale, hidden[segment])
                p = p * reciprocal(total)
                dp = _dot(vs[:, h], dys[:, h], ROWS_BY_ROWS)
                ds = p * (dp - jnp.sum(p * dp, 0, keepdims=True)) * scale
                ds = ds.astype(dtype)
                dv_heads.append(_dot(p.astype(dtype), dys[:, h], MATRICES))
                dk_heads.append(_dot(ds, qs[:, h], MATRICES))
                dq_T.append(_dot(k_T[h], ds, MATRICES))
            gradients = (_join(dq_T, 0).astype(dtype).T, _join(dk_heads, 1), _join(dv_heads, 1))
            for i, d in enumerate(gradients):
                dqkv[segment, :, pl.ds(i * width + start, columns.size)] = d.astype(dtype)
                sums[i] = sums[i] + jnp.sum(d.astype(jnp.float32), 0, keepdims=True)
        for i, row in enumerate(sums):
            dbias[0, i : i + 1, pl.ds(start, columns.size)] = row

    _for_columns(attend, width, heads.number)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Columns that are worked on together: as many heads as a register of 128 lanes holds.

    Attributes:
      size: their number.
      heads: where each head's are among them.
    """

    size: int
    heads: tuple[slice, ...]


def _for_columns(attend: Callable[[Any, Columns], None], width: int, heads: int) -> None:
    """Call `attend(first column, columns)` for all columns of a row.

    In a loop where all start at a register's: a schedule of six times the length takes the compiler
    ten times as long.
    """
    size = width // heads
    together = max(1, LANES // size)
    if heads % together:
        together = 1
    columns = Columns(
        together * size, tuple(slice(i * size, (i + 1) * size) for i in range(together))
    )
    starts = range(0, width, columns.size)
    if columns.size % LANES or len(starts) == 1:
        for start in starts:
            attend(start, columns)
        return

    at_once = math.gcd(len(starts), AT_ONCE)

    def step(i: Array, _: None) -> None:
        for j in range(at_once):
            attend(pl.multiple_of((i * at_once + j) * columns.size, LANES), columns)

    lax.fori_loop(0, len(starts) // at_once, step, None)


def _with_bias(qkv: Any, bias: Any, segment: int, start: Any, columns: Columns) -> list[Array]:
    """Return q, k and v of these columns, which lie side by side, with their biases."""
    width = bias.shape[-1]
    return [
        qkv[segment, :, pl.ds(i * width + start, columns.size)]
        + bias[i : i + 1, pl.ds(start, columns.size)]
        for i in range(3)
    ]


def _hidden_of_segments(
    segments: int, rows: int, heads: Heads, positions: list[Any]
) -> list[Array | None]:
    """Return for each segment which keys no query sees, bool [keys, queries]; None: none."""
    if not positions:
        return [_hidden(rows, heads)] * segments
    key = lax.broadcasted_iota(jnp.int32, (rows, rows), 0)
    query = lax.broadcasted_iota(jnp.int32, (rows, rows), 1)
    behind = query - key
    return [(behind < 0) | (behind > positions[0][segment]) for segment in range(segments)]


def _hidden(rows: int, heads: Heads) -> Array | None:
    """Return which keys no query sees, bool [keys, queries]; None where there are none."""
    packing = heads.packing
    stride, length = (packing.stride, packing.length) if packing else (rows, rows)
    key = lax.broadcasted_iota(jnp.int32, (rows, rows), 0)
    query = lax.broadcasted_iota(jnp.int32, (rows, rows), 1)
    conditions = []
    if heads.is_causal:
        conditions.append(key > query)
    # Which sequence a row is of, by comparisons: the TPU's vector unit divides no integers.
    starts = range(stride, rows, stride)
    if stride > length:
        key_sequence = sum(((key >= s).astype(jnp.int32) for s in starts), jnp.zeros_like(key))
        conditions.append(key - key_sequence * stride >= length)
    # Rows of one sequence stand behind the same starts. Mosaic compares no booleans.
    conditions += [jnp.logical_xor(key >= s, query >= s) for s in starts]
    return functools.reduce(jnp.logical_or, conditions) if conditions else None


def _unnormalized(q: Array, k: Array, scale: float, hidden: Array | None) -> tuple[Array, Array]:
    """Return exp(logits - maximum) as float32 [keys, queries], and its sums [1, queries]."""
    logits = _dot(k, q, ROWS_BY_ROWS)
    if hidden is not None:
        logits = jnp.where(hidden, HIDDEN, logits)
    p = jnp.exp((logits - jnp.max(logits, 0, keepdims=True)) * scale)
    return p, jnp.sum(p, 0, keepdims=True)


def _dot(a: Array, b: Array, dimensions: Any) -> Array:
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _join(parts: list[Array], axis: int) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)
