"""The losses in one pass over tiles of the logits, sharded by rows.

The N x N matrix never exists, except where a device's rows of it are small (`tiling`).

Every device holds b of the B rows. It gathers all texts once, and visits its [b, B] block of
logits in tiles of r rows and c columns: r of its images, c of the texts. Both directions of the
softmax come out of the same visit: rows and columns are summed as the tiles go by (online maximum
and sum), and a column's sums over the devices' rows are merged with B-vectors, not with B x D
features. The backward pass computes every tile again, or reads its cosines where they were kept.

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

TILE = {"cpu": 1024}
"""By platform. On a CPU a float32 tile of 4 MiB and what is computed from it stay in the cache."""
OTHER_TILE = 4096
"""64 MiB a float32 tile: products large enough to fill a GPU or TPU, in little of its memory."""
WHOLE_BYTES = 256 * 2**20
"""What the cosines of a single tile may take of a device, and its dloss/dlogits as much again: a
batch of 8,192 on one device, or 2,048 rows of a batch of 32,768."""
KEPT_BYTES = 512 * 2**20
"""What kept cosines may take of a device: those of 4,096 rows of a batch of 32,768, or of a batch
of 11,585 on one device."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Tiles of at most `size` rows and `size` columns.

    Attributes:
      size: most rows, and most columns, of a tile.
      keep: hold the cosines of all tiles until the backward pass instead of computing them again.
    """

    size: int
    keep: bool


def choose_tiling(
    rows_a_device: int, batch: int, features: int, platform: str, tile_size: int = 0
) -> Tiling:
    """The tiling of a batch; with a `tile_size` that one, its cosines not kept.

    Keeping the cosines saves one of four matrix products. A device's are b x B float32 numbers,
    which grow with the square of the batch, and the tiles are there to prevent that: so they are
    kept while they take at most `KEPT_BYTES`. They are also kept up to b = 2 D, where they are no
    more than the gathered texts and their float32 gradient, 2 x B x D numbers on every device.

    Up to `WHOLE_BYTES` there is one tile: three large matrix products are quicker than many small
    ones, and what they leave to memory is what the dense form leaves, or less.
    """
    if tile_size:
        return Tiling(tile_size, keep=False)
    cosines = 4 * rows_a_device * batch
    if cosines <= WHOLE_BYTES:
        return Tiling(batch, keep=True)
    keep = cosines <= KEPT_BYTES or rows_a_device <= 2 * features
    return Tiling(TILE.get(platform, OTHER_TILE), keep)


LEAST = -1e30  # below every logit, yet finite: -inf - -inf would be NaN where all is masked


class Side(NamedTuple):
    """One modality: a device's images, all the batch's texts, or one tile of either."""

    z: Float[Array, "rows D"]
    row: Int[Array, " rows"]
    valid: Bool[Array, " rows"]
    caption_id: UInt[Array, " rows"] | None


class Tile(NamedTuple):
    """Some images against some texts: masks of positives and negatives beside."""

    cosine_rc: Float[Array, "r c"]
    logits_rc: Float[Array, "r c"]
    own_rc: Bool[Array, "r c"]
    other_rc: Bool[Array, "r c"]


class Sums(NamedTuple):
    """What the forward pass keeps of rows, or of columns.

    Attributes:
      most: the largest negative's logit, LEAST without any.
      total: softmax: sum of exp(logit - most) over negatives. sigmoid: sum of the pairs' losses
        over a row, 0 over a column.
    """

    most: Array
    total: Array


@dataclasses.dataclass(frozen=True)
class TileLoss:
    """What sets one loss apart from another on the same walk.

    Attributes:
      fold: (tile, rows so far, columns so far, rows' new `most`, columns' new `most`)
        -> (rows' total, columns' total).
      finish: (rows, columns of this device, columns' `most` over all, rows' own logits, columns'
        own logits, axes) -> (loss of each row, of each column, what `slope` needs of rows, of
        columns). A bad row's own logit is 0.
      slope: (tile, kept of its rows, kept of its columns) -> dloss/dlogits, summed not averaged.
      takes_bias: whether the bias reaches the logits; if not its gradient is exactly 0.
    """

    fold: Callable[..., tuple[Array, Array]]
    finish: Callable[..., tuple[Array, Array, Array, Array]]
    slope: Callable[[Tile, Array, Array], Array]
    takes_bias: bool


def fold_softmax(tile: Tile, rows: Sums, columns: Sums, most_r: Array, most_c: Array):
    """Sums of exponentials, each below its maximum so that scale 100 cannot overflow.

    Where everything is masked so far the sum counts exp(0)s; the first real maximum, or the own
    logit in the end, scales them away with exp(LEAST - real) = 0.
    """
    negative_rc = jnp.where(tile.other_rc, tile.logits_rc, LEAST)
    total_r = jnp.sum(jnp.exp(negative_rc - most_r[:, None]), axis=1)
    total_c = jnp.sum(jnp.exp(negative_rc - most_c), axis=0)
    total_r += rows.total * jnp.exp(rows.most - most_r)
    return total_r, total_c + columns.total * jnp.exp(columns.most - most_c)


def finish_softmax(rows: Sums, columns: Sums, most_B: Array, own_b: Array, own_B: Array, axes):
    """Half the cross entropy of every row and every column, and their log-sum-exps."""
    total_B = lax.psum(columns.total * jnp.exp(columns.most - most_B), axes)
    row_b = jnp.logaddexp(rows.most + jnp.log(rows.total), own_b)
    column_B = jnp.logaddexp(most_B + jnp.log(total_B), own_B)
    return (row_b - own_b) / 2, (column_B - own_B) / 2, row_b, column_B


def slope_softmax(tile: Tile, row_r: Array, column_c: Array) -> Array:
    """(softmax over the row + softmax over the column) / 2 - 1 where the pair is its own."""
    rising_rc = jnp.exp(tile.logits_rc - row_r[:, None]) + jnp.exp(tile.logits_rc - column_c)
    return jnp.where(tile.own_rc | tile.other_rc, rising_rc / 2, 0) - tile.own_rc


def fold_sigmoid(tile: Tile, rows: Sums, columns: Sums, most_r: Array, most_c: Array):
    """The pairs' losses, summed along the row; columns would only count them again."""
    del most_r, most_c
    pair_rc = jax.nn.softplus(jnp.where(tile.own_rc, -tile.logits_rc, tile.logits_rc))
    total_r = jnp.sum(jnp.where(tile.own_rc | tile.other_rc, pair_rc, 0), axis=1)
    return rows.total + total_r, columns.total


def finish_sigmoid(rows: Sums, columns: Sums, most_B: Array, own_b: Array, own_B: Array, axes):
    """The rows' sums are the loss; the slope needs nothing but the logits."""
    del columns, own_b, own_B, axes
    nothing_b, nothing_B = jnp.zeros_like(rows.total), jnp.zeros_like(most_B)
    return rows.total, nothing_B, nothing_b, nothing_B


def slope_sigmoid(tile: Tile, row_r: Array, column_c: Array) -> Array:
    """sigmoid(logit) - 1 where the pair is its own."""
    del row_r, column_c
    seen_rc = tile.own_rc | tile.other_rc
    return jnp.where(seen_rc, jax.nn.sigmoid(tile.logits_rc), 0) - tile.own_rc


SOFTMAX = TileLoss(fold_softmax, finish_softmax, slope_softmax, takes_bias=False)
SIGMOID = TileLoss(fold_sigmoid, finish_sigmoid, slope_sigmoid, takes_bias=True)


@dataclasses.dataclass(frozen=True)
class Walk:
    """How a loss is walked: by whom, over which mesh axes, and by which tiles."""

    loss: TileLoss
    axes: tuple[str, ...]
    tiling: Tiling


def tile_rows(rows: int, tile_size: int) -> tuple[int, int]:
    """(number of tiles, rows of each): as few tiles as fit the size, all equally long.

    Splitting evenly leaves fewer padding rows than tiles: 1,500 rows are 2 x 750 at size 1,024,
    not 1,024 + 476 with 548 of padding. The same for columns.
    """
    tiles = -(-rows // tile_size)
    return tiles, -(-rows // tiles)


def split_rows(arrays: Any, tile_size: int) -> Any:
    """Arrays [B, ...] as [tiles, c, ...]; padding is 0, hence ok=False, hence masked."""

    def split(x: Array) -> Array:
        tiles, size = tile_rows(x.shape[0], tile_size)
        padding = [(0, tiles * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(tiles, size, *x.shape[1:])

    return jax.tree.map(split, arrays)


def join_rows(tiles: Any, rows: int) -> Any:
    """The inverse of `split_rows`: [tiles, c, ...] as [B, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows], tiles)


def cosines(images: Side, texts: Side) -> Float[Array, "r c"]:
    """float32 dot products."""
    return jnp.einsum(
        "rD,cD->rc",
        images.z,
        texts.z,
        precision=product_precision(images.z.dtype),
        preferred_element_type=jnp.float32,
    )


def make_tile(cosine_rc: Array, images: Side, texts: Side, scale: Array, bias: Array) -> Tile:
    """Logits and masks beside the cosines."""
    own_cell_rc = images.row[:, None] == texts.row
    other_rc = images.valid[:, None] & texts.valid & ~own_cell_rc
    if images.caption_id is not None and texts.caption_id is not None:
        other_rc &= images.caption_id[:, None] != texts.caption_id
    own_rc = own_cell_rc & images.valid[:, None] & texts.valid
    return Tile(cosine_rc, scale * cosine_rc + bias, own_rc, other_rc)


def own_logits(tile: Tile, images: Side, texts: Side) -> Float[Array, " r"]:
    """Each image's logit with its own text, 0 where the text is not in this tile or the row bad.

    Read off the tile, one cell a row, and not computed apart: where an own logit ties with
    another they must be equal to the last bit.
    """
    # A tile's columns are numbered without gaps, up to its padding, which is nobody's own.
    at_r = jnp.clip(images.row - texts.row[0], 0, texts.row.size - 1)[:, None]
    logit_r, own_r = (jnp.take_along_axis(x, at_r, axis=1)[:, 0] for x in tile[1:3])
    return jnp.where(own_r, logit_r, 0)


def local_side(
    z_bD: Array, valid_b: Array, caption_id_b: Array | None, axes: tuple[str, ...]
) -> Side:
    """This device's rows, numbered as in the global batch."""
    b = valid_b.size
    row_b = lax.axis_index(axes) * b + jnp.arange(b)
    return Side(good_features(z_bD, valid_b), row_b, valid_b, caption_id_b)


def gather_side(side: Side, axes: tuple[str, ...]) -> Side:
    """All devices' rows on every device, in the order of the global batch."""

    def gather(x: Array) -> Array:
        return lax.all_gather(x, axes, tiled=True, to="invarying")

    valid_B = gather(side.valid)
    caption_id_B = None if side.caption_id is None else gather(side.caption_id)
    return Side(gather(side.z), jnp.arange(valid_B.size), valid_B, caption_id_B)


def walk_forward(
    walk: Walk, images: Side, texts: Side, scale: Array, bias: Array
) -> tuple[Sums, Sums, Array, Array | None]:
    """One visit of every tile.

    Returns sums over rows [b], this device's part of the columns' [B], rows' own logits [b], and
    the cosines of the tiles where they are kept.
    """
    size = walk.tiling.size

    def visit(images_r: Side, so_far, tile_columns: tuple[Side, Sums]):
        (rows, own_r), (texts_c, columns) = so_far, tile_columns
        cosine_rc = cosines(images_r, texts_c)
        tile = make_tile(cosine_rc, images_r, texts_c, scale, bias)
        negative_rc = jnp.where(tile.other_rc, tile.logits_rc, LEAST)
        most_r = jnp.maximum(rows.most, jnp.max(negative_rc, axis=1))
        most_c = jnp.maximum(columns.most, jnp.max(negative_rc, axis=0))
        total_r, total_c = walk.loss.fold(tile, rows, columns, most_r, most_c)
        own_r += own_logits(tile, images_r, texts_c)
        kept = cosine_rc if walk.tiling.keep else None
        return (Sums(most_r, total_r), own_r), (Sums(most_c, total_c), kept)

    def visit_rows(columns: Sums, images_r: Side):
        zero_r = varying(walk, jnp.zeros(images_r.valid.shape))
        start = Sums(zero_r + LEAST, zero_r), zero_r
        tile_columns = split_rows(texts, size), columns
        (rows, own_r), (columns, kept) = lax.scan(
            functools.partial(visit, images_r), start, tile_columns
        )
        return columns, (rows, own_r, kept)

    zero_B = varying(walk, split_rows(jnp.zeros(texts.valid.shape), size))
    start = Sums(zero_B + LEAST, zero_B)
    columns, (rows, own_b, kept) = lax.scan(visit_rows, start, split_rows(images, size))
    rows, own_b = join_rows((rows, own_b), images.valid.size)
    return rows, join_rows(columns, texts.valid.size), own_b, kept


def walk_backward(
    walk: Walk,
    images: Side,
    texts: Side,
    scale: Array,
    bias: Array,
    row_b: Array,
    column_B: Array,
    kept: Array | None,
) -> tuple[Array, Array, Array, Array]:
    """A second visit: gradients of the summed loss.

    Returns those of this device's images, and this device's part of those of all texts, of the
    scale and of the bias; the features' still lack the factor `scale`.
    """
    size, features = walk.tiling.size, images.z.dtype

    def product(subscripts: str, slope_rc: Array, z: Array) -> Array:
        precision = product_precision(features)
        return jnp.einsum(subscripts, slope_rc, z.astype(jnp.float32), precision=precision)

    def visit(rows, so_far, columns):
        (images_r, row_r), (dz_image_rD, dscale, dbias) = rows, so_far
        texts_c, column_c, dz_text_cD, cosine_rc = columns
        cosine_rc = cosines(images_r, texts_c) if cosine_rc is None else cosine_rc
        tile = make_tile(cosine_rc, images_r, texts_c, scale, bias)
        slope_rc = walk.loss.slope(tile, row_r, column_c)
        dz_image_rD += product("rc,cD->rD", slope_rc, texts_c.z)
        dz_text_cD += product("rc,rD->cD", slope_rc, images_r.z)
        dscale += jnp.sum(slope_rc * cosine_rc)
        dbias += jnp.sum(slope_rc) if walk.loss.takes_bias else 0
        return (dz_image_rD, dscale, dbias), dz_text_cD

    def visit_rows(so_far, rows):
        (dz_text_BD, dscale, dbias), (images_r, row_r, kept_r) = so_far, rows
        dz_image_rD = varying(walk, jnp.zeros(images_r.z.shape))
        columns = *split_rows((texts, column_B), size), dz_text_BD, kept_r
        (dz_image_rD, dscale, dbias), dz_text_BD = lax.scan(
            functools.partial(visit, (images_r, row_r)), (dz_image_rD, dscale, dbias), columns
        )
        return (dz_text_BD, dscale, dbias), dz_image_rD

    zero = varying(walk, jnp.zeros(()))
    start = varying(walk, split_rows(jnp.zeros(texts.z.shape), size)), zero, zero
    rows = *split_rows((images, row_b), size), kept
    (dz_text_BD, dscale, dbias), dz_image_bD = lax.scan(visit_rows, start, rows)
    dz_image_bD = join_rows(dz_image_bD, images.valid.size)
    return dz_image_bD, join_rows(dz_text_BD, texts.valid.size), dscale, dbias


def varying(walk: Walk, x: Array) -> Array:
    """A value that differs between devices, as what a scan carries must be declared."""
    return lax.pcast(x, walk.axes, to="varying")


def forward_shard(walk: Walk, z_image_bD, z_text_bD, scale, bias, valid_b, caption_id_b):
    """One device's share of the forward pass.

    Returns (LossOutput, gathered texts, kept of rows, kept of columns, kept cosines or None).
    """
    axes = walk.axes
    images = local_side(z_image_bD, valid_b, caption_id_b, axes)
    texts = gather_side(local_side(z_text_bD, valid_b, caption_id_b, axes), axes)
    rows, columns, own_b, kept = walk_forward(walk, images, texts, scale, bias)
    most_B = lax.pmax(columns.most, axes)
    own_B = lax.psum(jnp.zeros_like(most_B).at[images.row].set(own_b), axes)
    loss_b, loss_B, row_b, column_B = walk.loss.finish(rows, columns, most_B, own_b, own_B, axes)

    image_hits = jnp.sum(valid_b & (own_b > rows.most))
    text_hits = jnp.sum(texts.valid & (own_B > most_B))
    total, image_hits = lax.psum((jnp.sum(loss_b), image_hits), axes)
    total += jnp.sum(loss_B)
    means = (x / good_rows(texts.valid) for x in (total, image_hits, text_hits))
    return LossOutput(*means), texts, row_b, column_B, kept


def backward_shard(
    walk: Walk, z_image_bD, scale, bias, valid_b, caption_id_b, texts, row_b, column_B, kept, weight
):
    """One device's share of the backward pass; `weight` is the loss's own cotangent."""
    images = local_side(z_image_bD, valid_b, caption_id_b, walk.axes)
    dz_image_bD, dz_text_BD, dscale, dbias = walk_backward(
        walk, images, texts, scale, bias, row_b, column_B, kept
    )
    dz_text_bD = lax.psum_scatter(dz_text_BD, walk.axes, tiled=True)
    dscale, dbias = lax.psum((dscale, dbias), walk.axes)
    weight /= good_rows(texts.valid)
    dz_image_bD = (weight * scale * dz_image_bD).astype(z_image_bD.dtype)
    dz_text_bD = (weight * scale * dz_text_bD).astype(texts.z.dtype)
    return dz_image_bD, dz_text_bD, weight * dscale, weight * dbias


def make_tiled_loss(
    loss: TileLoss, *, mesh: Mesh, batch_axes: tuple[str, ...], tile_size: int
) -> Callable[..., LossOutput]:
    """The loss over global arrays whose rows are sharded over `batch_axes` of the mesh, in order.

    Any further axis of the mesh holds copies. A `tile_size` of 0 is chosen by `choose_tiling`, the
    only one that may keep cosines for the backward pass. Else the largest arrays of a device are
    its tiles, all texts [B, D] and their float32 gradient. Between the passes stay the inputs, the
    log-sum-exps and the gathered texts: the backward pass of a loss comes at once and begins with
    them, so keeping them costs no memory at the peak and saves gathering twice.

    Returns:
      (z_image_BD, z_text_BD, scale, bias, ok_B, caption_id_B or None) -> LossOutput, with reverse-
      mode gradients for the first four. Raises UserError if the rows do not split evenly.
    """
    devices = math.prod(mesh.shape[axis] for axis in batch_axes)
    platform = mesh.devices.flat[0].platform

    def loss_fn(z_image_BD, z_text_BD, scale, bias, valid_B, caption_id_B) -> LossOutput:
        rows, features = z_image_BD.shape
        if rows % devices:
            raise UserError(
                f"a batch of {rows} rows does not split over {devices} devices "
                f"({' x '.join(batch_axes)}): take a multiple of {devices}"
            )
        tiling = choose_tiling(rows // devices, rows, features, platform, tile_size)
        scale = jnp.asarray(scale, jnp.float32)
        bias = jnp.asarray(bias if loss.takes_bias else 0, jnp.float32)
        tiled = _differentiable(Walk(loss, batch_axes, tiling), mesh)
        return tiled(z_image_BD, z_text_BD, scale, bias, valid_B, caption_id_B)

    return loss_fn


def _differentiable(walk: Walk, mesh: Mesh) -> Callable[..., LossOutput]:
    """Both passes under `shard_map`, as one function with a gradient."""
    r, a = PartitionSpec(walk.axes), PartitionSpec()  # sharded rows; the same on all devices
    forward: Callable[..., Any] = jax.shard_map(
        functools.partial(forward_shard, walk),
        mesh=mesh,
        in_specs=(r, r, a, a, r, r),
        out_specs=(a, a, r, a, r),
    )
    backward: Callable[..., Any] = jax.shard_map(
        functools.partial(backward_shard, walk),
        mesh=mesh,
        in_specs=(r, a, a, r, r, a, r, a, r, a),
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
    return tiled
