"""The losses in one pass over column tiles, sharded by rows: the N x N matrix never exists.

Every device holds b of the B rows. It gathers all texts once, and visits its [b, B] block of
logits in tiles of c columns: `b` and `c` are both parts of B, one device's images and one tile's
texts. Both directions of the softmax come out of the same visit: rows are summed as the tiles go
by (online maximum and sum), a column's partial maximum and sum over this device's rows are merged
with B-vectors, not with B x D features. The backward pass computes every tile again.

It equals the dense form because a log-sum-exp may be split anywhere: of parts with maxima m_k and
sums s_k = sum(exp(x - m_k)), it is m + log(sum_k s_k exp(m_k - m)) with m = max_k m_k.

Precision of the gradient: the tile's dloss/dlogits is float32, as are the sums over tiles and
devices and the gradients of scale and bias. With float32 features the products are float32 too.
With bfloat16 features the logits' products are exact and their sums float32; the two products of
dloss/dlogits with features run at the backend's default float32 precision (exact on CPU, TF32 on
GPU, bfloat16 factors on TPU), and the result is rounded once, to bfloat16, at the very end.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt

from clip_jax.errors import UserError
from clip_jax.losses.dense import LossOutput, good_features, good_rows, product_precision

LEAST = -1e30  # below every logit, yet finite: -inf - -inf would be NaN where all is masked


class Side(NamedTuple):
    """One modality: a device's images, all the batch's texts, or one tile of these."""

    z: Float[Array, "rows D"]
    row: Int[Array, " rows"]
    ok: Bool[Array, " rows"]
    caption_id: UInt[Array, " rows"] | None


class Tile(NamedTuple):
    """A device's images against one tile of texts: masks of positives and negatives beside."""

    cosine_bc: Float[Array, "b c"]
    logits_bc: Float[Array, "b c"]
    own_bc: Bool[Array, "b c"]
    other_bc: Bool[Array, "b c"]


class Sums(NamedTuple):
    """What the forward pass keeps of rows, or of columns.

    Attributes:
      most: the largest negative's logit, LEAST without any.
      own: the positive's logit, 0 in a bad row.
      total: softmax: sum of exp(logit - most) over negatives. sigmoid: sum of the pairs' losses
        over a row, 0 over a column.
    """

    most: Array
    own: Array
    total: Array


@dataclasses.dataclass(frozen=True)
class TileLoss:
    """What sets one loss apart from another on the same walk.

    Attributes:
      fold: (tile, rows so far, rows' new `most`, columns' `most`) -> (rows' total, columns' total).
      finish: (rows, columns of this device, columns' `most` over all, their `own`, axes)
        -> (loss of each row, loss of each column, what `slope` needs of rows, of columns).
      slope: (tile, kept of rows, kept of the tile's columns) -> dloss/dlogits, summed not averaged.
      takes_bias: whether the bias reaches the logits; if not its gradient is exactly 0.
    """

    fold: Callable[..., tuple[Array, Array]]
    finish: Callable[..., tuple[Array, Array, Array, Array]]
    slope: Callable[[Tile, Array, Array], Array]
    takes_bias: bool


def fold_softmax(tile: Tile, rows: Sums, most_b: Array, most_c: Array) -> tuple[Array, Array]:
    """Sums of exponentials, each below its maximum so that scale 100 cannot overflow.

    Where everything is masked so far the sum counts exp(0)s; the first real maximum, or the own
    logit in the end, scales them away with exp(LEAST - real) = 0.
    """
    negative_bc = jnp.where(tile.other_bc, tile.logits_bc, LEAST)
    total_b = jnp.sum(jnp.exp(negative_bc - most_b[:, None]), axis=1)
    total_c = jnp.sum(jnp.exp(negative_bc - most_c[None, :]), axis=0)
    return rows.total * jnp.exp(rows.most - most_b) + total_b, total_c


def finish_softmax(rows: Sums, columns: Sums, most_B: Array, own_B: Array, axes: tuple[str, ...]):
    """Half the cross entropy of every row and every column, and their log-sum-exps."""
    total_B = lax.psum(columns.total * jnp.exp(columns.most - most_B), axes)
    row_b = jnp.logaddexp(rows.most + jnp.log(rows.total), rows.own)
    column_B = jnp.logaddexp(most_B + jnp.log(total_B), own_B)
    return (row_b - rows.own) / 2, (column_B - own_B) / 2, row_b, column_B


def slope_softmax(tile: Tile, row_b: Array, column_c: Array) -> Array:
    """(softmax over the row + softmax over the column) / 2 - 1 where the pair is its own."""
    rising_bc = jnp.exp(tile.logits_bc - row_b[:, None]) + jnp.exp(tile.logits_bc - column_c)
    return jnp.where(tile.own_bc | tile.other_bc, rising_bc / 2, 0) - tile.own_bc


def fold_sigmoid(tile: Tile, rows: Sums, most_b: Array, most_c: Array) -> tuple[Array, Array]:
    """The pairs' losses, summed along the row; columns would only count them again."""
    del most_b
    pair_bc = jax.nn.softplus(jnp.where(tile.own_bc, -tile.logits_bc, tile.logits_bc))
    total_b = jnp.sum(jnp.where(tile.own_bc | tile.other_bc, pair_bc, 0), axis=1)
    return rows.total + total_b, jnp.zeros_like(most_c)


def finish_sigmoid(rows: Sums, columns: Sums, most_B: Array, own_B: Array, axes: tuple[str, ...]):
    """The rows' sums are the loss; the slope needs nothing but the logits."""
    del columns, own_B, axes
    nothing_b, nothing_B = jnp.zeros_like(rows.total), jnp.zeros_like(most_B)
    return rows.total, nothing_B, nothing_b, nothing_B


def slope_sigmoid(tile: Tile, row_b: Array, column_c: Array) -> Array:
    """sigmoid(logit) - 1 where the pair is its own."""
    del row_b, column_c
    seen_bc = tile.own_bc | tile.other_bc
    return jnp.where(seen_bc, jax.nn.sigmoid(tile.logits_bc), 0) - tile.own_bc


SOFTMAX = TileLoss(fold_softmax, finish_softmax, slope_softmax, takes_bias=False)
SIGMOID = TileLoss(fold_sigmoid, finish_sigmoid, slope_sigmoid, takes_bias=True)


@dataclasses.dataclass(frozen=True)
class Walk:
    """How a loss is walked: by whom, over which mesh axes, in tiles of how many columns at most."""

    loss: TileLoss
    axes: tuple[str, ...]
    tile_size: int


def tile_columns(rows: int, tile_size: int) -> tuple[int, int]:
    """(number of tiles, columns of each): as few tiles as fit the size, all equally wide.

    Splitting evenly leaves fewer padding columns than tiles: 1,500 columns are 2 x 750 at size
    1,024, not 1,024 + 476 with 548 of padding.
    """
    tiles = -(-rows // tile_size)
    return tiles, -(-rows // tiles)


def split_columns(texts: Any, tile_size: int) -> Any:
    """Arrays [B, ...] as [tiles, c, ...]; padding is 0, hence ok=False, hence masked."""

    def split(x: Array) -> Array:
        tiles, columns = tile_columns(x.shape[0], tile_size)
        padding = [(0, tiles * columns - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(tiles, columns, *x.shape[1:])

    return jax.tree.map(split, texts)


def join_columns(tiles: Any, rows: int) -> Any:
    """The inverse of `split_columns`: [tiles, c, ...] as [B, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows], tiles)


def make_tile(images: Side, texts: Side, scale: Array, bias: Array) -> Tile:
    """Logits and masks of images against one tile of texts."""
    cosine_bc = jnp.einsum(
        "bD,cD->bc",
        images.z,
        texts.z,
        precision=product_precision(images.z.dtype),
        preferred_element_type=jnp.float32,
    )
    own_cell_bc = images.row[:, None] == texts.row
    other_bc = images.ok[:, None] & texts.ok & ~own_cell_bc
    if images.caption_id is not None and texts.caption_id is not None:
        other_bc &= images.caption_id[:, None] != texts.caption_id
    own_bc = own_cell_bc & images.ok[:, None] & texts.ok
    return Tile(cosine_bc, scale * cosine_bc + bias, own_bc, other_bc)


def local_side(z_bD: Array, ok_b: Array, caption_id_b: Array | None, axes: tuple[str, ...]) -> Side:
    """This device's rows, numbered as in the global batch."""
    b = ok_b.size
    row_b = lax.axis_index(axes) * b + jnp.arange(b)
    return Side(good_features(z_bD, ok_b), row_b, ok_b, caption_id_b)


def gather_side(side: Side, axes: tuple[str, ...]) -> Side:
    """All devices' rows on every device, in the order of the global batch."""

    def gather(x: Array) -> Array:
        return lax.all_gather(x, axes, tiled=True, to="invarying")

    ok_B = gather(side.ok)
    caption_id_B = None if side.caption_id is None else gather(side.caption_id)
    return Side(gather(side.z), jnp.arange(ok_B.size), ok_B, caption_id_B)


def walk_forward(
    walk: Walk, images: Side, texts: Side, scale: Array, bias: Array
) -> tuple[Sums, Sums]:
    """One visit of every tile: sums over rows [b], and this device's part of the columns' [B]."""

    def visit(rows: Sums, texts_c: Side) -> tuple[Sums, Sums]:
        tile = make_tile(images, texts_c, scale, bias)
        negative_bc = jnp.where(tile.other_bc, tile.logits_bc, LEAST)
        own_bc = jnp.where(tile.own_bc, tile.logits_bc, 0)
        most_b = jnp.maximum(rows.most, jnp.max(negative_bc, axis=1))
        most_c = jnp.max(negative_bc, axis=0)
        total_b, total_c = walk.loss.fold(tile, rows, most_b, most_c)
        columns = Sums(most_c, jnp.sum(own_bc, axis=0), total_c)
        return Sums(most_b, rows.own + jnp.sum(own_bc, axis=1), total_b), columns

    zero_b = jnp.zeros(images.ok.shape)
    start = lax.pcast(Sums(zero_b + LEAST, zero_b, zero_b), walk.axes, to="varying")
    rows, columns = lax.scan(visit, start, split_columns(texts, walk.tile_size))
    return rows, join_columns(columns, texts.ok.size)


def walk_backward(
    walk: Walk, images: Side, texts: Side, scale: Array, bias: Array, row_b: Array, column_B: Array
) -> tuple[Array, Array, Array, Array]:
    """A second visit: gradients of the summed loss.

    Returns those of this device's images, and this device's part of those of all texts, of the
    scale and of the bias.
    """
    features = images.z.dtype

    def product(subscripts: str, slope_bc: Array, z: Array) -> Array:
        z, precision = z.astype(jnp.float32), product_precision(features)
        return scale * jnp.einsum(subscripts, slope_bc, z, precision=precision)

    def visit(carry, columns):
        texts_c, column_c = columns
        tile = make_tile(images, texts_c, scale, bias)
        slope_bc = walk.loss.slope(tile, row_b, column_c)
        dz_image_bD, dscale, dbias = carry
        dz_image_bD += product("bc,cD->bD", slope_bc, texts_c.z)
        dscale += jnp.sum(slope_bc * tile.cosine_bc)
        dbias += jnp.sum(slope_bc)
        return (dz_image_bD, dscale, dbias), product("bc,bD->cD", slope_bc, images.z)

    start = (jnp.zeros(images.z.shape), jnp.zeros(()), jnp.zeros(()))
    start = lax.pcast(start, walk.axes, to="varying")
    columns = split_columns((texts, column_B), walk.tile_size)
    (dz_image_bD, dscale, dbias), dz_text_tiles = lax.scan(visit, start, columns)
    return dz_image_bD, join_columns(dz_text_tiles, texts.ok.size), dscale, dbias


def forward_shard(walk: Walk, z_image_bD, z_text_bD, scale, bias, ok_b, caption_id_b):
    """One device's share of the forward pass: (LossOutput, gathered texts, kept rows, columns)."""
    axes = walk.axes
    images = local_side(z_image_bD, ok_b, caption_id_b, axes)
    texts = gather_side(local_side(z_text_bD, ok_b, caption_id_b, axes), axes)
    rows, columns = walk_forward(walk, images, texts, scale, bias)
    most_B, own_B = lax.pmax(columns.most, axes), lax.psum(columns.own, axes)
    loss_b, loss_B, row_b, column_B = walk.loss.finish(rows, columns, most_B, own_B, axes)

    image_hits = jnp.sum(ok_b & (rows.own > rows.most))
    text_hits = jnp.sum(texts.ok & (own_B > most_B))
    total, image_hits = lax.psum((jnp.sum(loss_b), image_hits), axes)
    total += jnp.sum(loss_B)
    means = (x / good_rows(texts.ok) for x in (total, image_hits, text_hits))
    return LossOutput(*means), texts, row_b, column_B


def backward_shard(
    walk: Walk, z_image_bD, scale, bias, ok_b, caption_id_b, texts, row_b, column_B, weight
):
    """One device's share of the backward pass; `weight` is the loss's own cotangent."""
    images = local_side(z_image_bD, ok_b, caption_id_b, walk.axes)
    dz_image_bD, dz_text_BD, dscale, dbias = walk_backward(
        walk, images, texts, scale, bias, row_b, column_B
    )
    dz_text_bD = lax.psum_scatter(dz_text_BD, walk.axes, tiled=True)
    dscale, dbias = lax.psum((dscale, dbias), walk.axes)
    weight /= good_rows(texts.ok)
    dz_image_bD = (weight * dz_image_bD).astype(z_image_bD.dtype)
    dz_text_bD = (weight * dz_text_bD).astype(texts.z.dtype)
    return dz_image_bD, dz_text_bD, weight * dscale, weight * dbias


def make_tiled_loss(
    loss: TileLoss, *, mesh: Mesh, batch_axes: tuple[str, ...], tile_size: int
) -> Callable[..., LossOutput]:
    """The loss over global arrays whose rows are sharded over `batch_axes` of the mesh, in order.

    Any further axis of the mesh holds copies. The largest arrays of a device are its [b, c] tiles,
    all texts [B, D] and their float32 gradient. Between the passes stay the inputs, the log-sum-
    exps and the gathered texts: the backward pass of a loss comes at once and begins with them, so
    keeping them costs no memory at the peak and saves gathering twice.

    Returns:
      (z_image_BD, z_text_BD, scale, bias, ok_B, caption_id_B or None) -> LossOutput, with reverse-
      mode gradients for the first four. Raises UserError if the rows do not split evenly.
    """
    walk = Walk(loss, batch_axes, tile_size)
    r, a = PartitionSpec(batch_axes), PartitionSpec()  # sharded rows; the same on all devices
    forward: Callable[..., Any] = jax.shard_map(
        functools.partial(forward_shard, walk),
        mesh=mesh,
        in_specs=(r, r, a, a, r, r),
        out_specs=(a, a, r, a),
    )
    backward: Callable[..., Any] = jax.shard_map(
        functools.partial(backward_shard, walk),
        mesh=mesh,
        in_specs=(r, a, a, r, r, a, r, a, a),
        out_specs=(r, r, a, a),
    )

    # The custom_vjp stands outside both shard_maps, so JAX never transposes one. Transposing
    # decides by itself whether the cotangent of a replicated output is summed or divided over
    # devices, and without check_vma it came out wrong by exactly the device count.
    @jax.custom_vjp
    def tiled(*inputs) -> LossOutput:
        return forward(*inputs)[0]

    def tiled_forward(z_image_BD, z_text_BD, *others):
        output, *kept = forward(z_image_BD, z_text_BD, *others)
        return output, (z_image_BD, *others, *kept)

    def tiled_backward(residuals, cotangent: LossOutput):
        return (*backward(*residuals, cotangent.loss), None, None)

    tiled.defvjp(tiled_forward, tiled_backward)
    devices = math.prod(mesh.shape[axis] for axis in batch_axes)

    def loss_fn(z_image_BD, z_text_BD, scale, bias, ok_B, caption_id_B) -> LossOutput:
        if ok_B.size % devices:
            raise UserError(
                f"a batch of {ok_B.size} rows does not split over {devices} devices "
                f"({' x '.join(batch_axes)}): take a multiple of {devices}"
            )
        scale = jnp.asarray(scale, jnp.float32)
        bias = jnp.asarray(bias if loss.takes_bias else 0, jnp.float32)
        return tiled(z_image_BD, z_text_BD, scale, bias, ok_B, caption_id_B)

    return loss_fn
