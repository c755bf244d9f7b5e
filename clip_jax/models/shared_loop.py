"""A loop of blocks whose kernels the devices share, with exchanges of its own.

`fsdp` splits a kernel along the width of the residual stream. A compiler that partitions a loop
gathers a block's kernels when its turn begins and exchanges their gradients before it ends, and
both are waited for. Here a turn gathers the kernels of the next block, in both passes, and adds up
the gradients of the block before: nothing in the turn needs either, so that both can travel beside
its products. Two blocks' kernels are whole at a time. Each pass gathers one block too many, and the
backward pass first adds up zeros: a turn has no other before it.

A block's kernels travel side by side, in one exchange. Biases and gains are small, and they and
their gradients travel at once for all blocks.

Values and gradients are those of `minimal_block.residual_block`, to rounding.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from clip_jax.models.minimal_block import BlockParts, Saved, block_gradients, block_output
from clip_jax.models.target import Target
from clip_jax.typing import leaves_by_path

AXIS = "fsdp"
OUTPUTS = ("out_proj", "c_proj")
"""Dense layers that return the residual stream, whose kernels end with its width; others' begin."""


def shares_kernels(target: Target, batch: int, width: int) -> bool:
    """Return whether these devices share kernels of this width, and nothing but rows besides.

    Not on GPUs, for whose compiler the form was not measured.
    """
    if target.platform not in ("cpu", "tpu") or not target.splits_rows_alone:
        return False
    if target.mesh is None or not target.shares(batch):
        return False
    shards = target.mesh.shape.get(AXIS, 1)
    return shards > 1 and width % shards == 0


Flat = dict[str, Array]
"""Parameters or gradients by path."""


def shared_loop(
    parts: BlockParts,
    target: Target,
    stacked: Any,
    x_ND: Float[Array, "N D"],
    positions_SR: Int[Array, "S R"] | None = None,
) -> Float[Array, "N D"]:
    """Return what blocks return, one behind another.

    Args:
      parts: of each block, for the rows of one device.
      target: all devices, for which `shares_kernels` holds.
      stacked: the parameters of `layers.ResidualBlock`, each with a leading axis of blocks.
      x_ND: the residual stream.
      positions_SR: as `minimal_block.residual_block` takes it.
    """
    rows = P(target.batch_axes)
    flat = leaves_by_path(stacked)
    places = shared_places(flat)
    mapped = functools.partial(jax.shard_map, mesh=target.mesh, check_vma=False)
    inputs = (places, rows, rows)

    @jax.custom_vjp
    def blocks(flat: Flat, x_ND: Array, positions_SR: Array | None) -> Array:
        run = functools.partial(_forward, parts, differentiated=False)
        return mapped(run, in_specs=inputs, out_specs=(rows, None))(flat, x_ND, positions_SR)[0]

    def forward(flat: Flat, x_ND: Array, positions_SR: Array | None) -> tuple[Array, Any]:
        run = functools.partial(_forward, parts, differentiated=True)
        run = mapped(run, in_specs=inputs, out_specs=(rows, rows))
        out_ND, saved = run(flat, x_ND, positions_SR)
        return out_ND, (flat, saved)

    def backward(residuals: tuple[Flat, Any], d_ND: Array) -> tuple[Flat, Array, None]:
        run = functools.partial(_backward, parts, target.batch_axes)
        run = mapped(run, in_specs=inputs, out_specs=(places, rows))
        return *run(*residuals, d_ND), None

    blocks.defvjp(forward, backward)
    return blocks(flat, x_ND, positions_SR)


def shared_places(flat: Mapping[str, Any]) -> dict[str, P]:
    """Return the places of stacked parameters, or of their shapes, by path: kernels are shared."""

    def place(name: str, axes: int) -> P:
        shared = axes - 1 if _is_output(name) else 1
        return P(*(AXIS if axis == shared else None for axis in range(axes)))

    return {
        name: place(name, len(x.shape)) if _is_kernel(name) else P() for name, x in flat.items()
    }


def _is_kernel(name: str) -> bool:
    """Return whether a parameter is a kernel, which is shared."""
    return name.endswith("kernel")


def _is_output(name: str) -> bool:
    """Return whether a kernel ends with the width of the stream."""
    return name.split("/")[-2] in OUTPUTS


def _forward(
    parts: BlockParts, flat: Flat, x: Array, positions_SR: Array | None, *, differentiated: bool
) -> tuple[Array, Any]:
    """Return the last block's output and what `_backward` takes, on one device."""
    kernels, vectors = _matrices(flat), _vectors(flat)
    last = _count(flat) - 1

    def turn(carry: tuple[Array, Array], block: tuple[Array, Flat]) -> tuple[Any, Any]:
        (x, whole), (i, own) = carry, block
        following = _gather(parts, kernels, jnp.minimum(i + 1, last))
        params = _parameters(flat, _split(whole, kernels), own)
        x, saved = block_output(parts, params, x, positions_SR, differentiated=differentiated)
        return (x, following), saved and saved._replace(params=None)

    start = x, _gather(parts, kernels, 0)
    (x, _), saved = lax.scan(turn, start, (jnp.arange(last + 1), vectors))
    # The devices' own, side by side.
    return x, jax.tree.map(lambda x: x[None], saved)


def _backward(
    parts: BlockParts, axes: tuple[str, ...], flat: Flat, saved: Any, d: Array
) -> tuple[Flat, Array]:
    """Return the gradients of the parameters, shared as these are, and of the first's input."""
    kernels, vectors = _matrices(flat), _vectors(flat)
    last = _count(flat) - 1

    def turn(carry: tuple[Array, Array, Flat], block: tuple[Array, Flat, Saved]) -> tuple[Any, Any]:
        (d, whole, later), (i, own, saved) = carry, block
        preceding = _gather(parts, kernels, jnp.maximum(i - 1, 0))
        added_up = _add_up(later, axes)
        saved = saved._replace(params=_parameters(flat, _split(whole, kernels), own))
        grads, d = block_gradients(parts, saved, d)
        grads = leaves_by_path(grads)
        return (d, preceding, _as_matrices(grads)), (added_up, _vectors(grads))

    whole = _gather(parts, kernels, last)
    width = lax.axis_size(AXIS) * whole.shape[1]
    nothing = {n: jnp.zeros((width, x.shape[-1]), jnp.float32) for n, x in kernels.items()}
    own_saved = jax.tree.map(lambda x: x[0], saved)
    blocks = jnp.arange(last + 1), vectors, own_saved
    (d, _, first), (later, vectors) = lax.scan(turn, (d, whole, nothing), blocks, reverse=True)
    of_first = _add_up(first, axes)
    # A turn adds up what the block behind it left.
    sums = _split(jnp.concatenate([of_first[None], later[:-1]]), kernels)
    grads = lax.psum(vectors, axes)
    for name, matrices in sums.items():
        shape = flat[name].shape[1:]
        grads[name] = jax.vmap(lambda x, n=name, s=shape: _from_matrix(x, n, s))(matrices)
    return {name: grads[name].astype(x.dtype) for name, x in flat.items()}, d


def _count(flat: Flat) -> int:
    """Return the number of blocks."""
    return next(iter(flat.values())).shape[0]


def _vectors(flat: Flat) -> Flat:
    """Return all but the kernels."""
    return {name: x for name, x in flat.items() if not _is_kernel(name)}


def _matrices(flat: Flat) -> Flat:
    """Return the stacked kernels as matrices whose rows are the width of the stream."""
    kernels = {name: x for name, x in flat.items() if _is_kernel(name)}
    return {n: jax.vmap(lambda x, n=n: _as_matrix(x, n))(x) for n, x in kernels.items()}


def _as_matrices(flat: Flat) -> Flat:
    """Return a block's kernels as such matrices."""
    return {name: _as_matrix(x, name) for name, x in flat.items() if _is_kernel(name)}


def _as_matrix(kernel: Array, name: str) -> Array:
    """Return a kernel, or a share of one, as a matrix of a row for each feature of the stream."""
    rows = jnp.moveaxis(kernel, -1, 0) if _is_output(name) else kernel
    return rows.reshape(len(rows), -1)


def _from_matrix(matrix: Array, name: str, shape: tuple[int, ...]) -> Array:
    """Return a kernel of this shape: the inverse of `_as_matrix`."""
    if not _is_output(name):
        return matrix.reshape(shape)
    return jnp.moveaxis(matrix.reshape(shape[-1], *shape[:-1]), 0, -1)


def _gather(parts: BlockParts, kernels: Flat, i: Array | int) -> Array:
    """Return block i's kernels whole, side by side: [shards, rows of a share, columns]."""

    def share(stacked: Array) -> Array:
        return lax.dynamic_index_in_dim(stacked, i, keepdims=False).astype(parts.dtype)

    # Along an axis of its own: the shares need not be whole tiles of the device.
    return lax.all_gather(jnp.concatenate([share(x) for x in kernels.values()], 1), AXIS)


def _split(side_by_side: Array, kernels: Flat) -> Flat:
    """Return what lies side by side along the last axis."""
    sizes = [x.shape[-1] for x in kernels.values()]
    columns = jnp.split(side_by_side, list(itertools.accumulate(sizes[:-1])), -1)
    return dict(zip(kernels, columns, strict=True))


def _add_up(matrices: Flat, axes: tuple[str, ...]) -> Array:
    """Return this device's share of the sums of all devices' matrices, side by side."""
    shards = lax.axis_size(AXIS)
    others = tuple(axis for axis in axes if axis != AXIS)
    rows = [x.reshape(shards, -1, x.shape[1]) for x in matrices.values()]
    return lax.psum(lax.psum_scatter(jnp.concatenate(rows, 2), AXIS), others)


def _parameters(flat: Flat, kernels: Flat, vectors: Flat) -> Any:
    """Return a block's parameters of its kernels, as whole matrices, and of the others."""
    shards = lax.axis_size(AXIS)
    whole = {}
    for name, shares in kernels.items():
        matrix = shares.reshape(-1, shares.shape[2])
        shape = list(flat[name].shape[1:])
        shape[-1 if _is_output(name) else 0] *= shards
        whole[name] = _from_matrix(matrix, name, tuple(shape))
    return unflatten_dict(whole | vectors, sep="/")
