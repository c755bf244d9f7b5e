"""The losses in one pass over tiles of the logits, sharded by rows under `shard_map`.

The B x B matrix never exists, except where a device's rows of it are small (`choose_tiling`).

Every device holds b of the B rows. It gathers all texts once, and visits its [b, B] block of
logits in tiles of r rows and c columns: r of its images, c of the texts. Both directions of the
softmax come out of the same visit: rows and columns are summed as the tiles go by (running maximum
and sum), and a column's sums over the devices' rows are merged with B-vectors, not with B x D
features. The backward pass computes every tile again, or reads its cosines where they were saved.

It equals the dense form because a log-sum-exp may be split anywhere: of parts with maxima m_k and
sums s_k = sum(exp(x - m_k)), it is m + log(sum_k s_k exp(m_k - m)) with m = max_k m_k.

Precision of the gradient: the tile's dloss/dlogits is float32, as are the sums over tiles and
devices and the gradients of scale and bias. With float32 features the products are float32 too.
With bfloat16 features the logits' products are exact and their sums float32; the two products of
dloss/dlogits with features run at the backend's default float32 precision (exact on CPU, TF32 on
GPU, bfloat16 factors on TPU), and the result is rounded once, to bfloat16, at the very end.

The file in order: the size of the tiles; what one loss differs in from another; one tile and its
masks; the walk over all tiles, forward and backward; the same under `shard_map`, with a gradient.
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
from clip_jax.losses.dense import (
    LossOutput,
    Negatives,
    count_valid,
    dot_products,
    product_precision,
    zero_invalid,
)

CPU_TILE = 1024
"""A float32 tile of 4 MiB and what is computed from it stay in a CPU's cache."""
ACCELERATOR_TILE = 4096
"""64 MiB a float32 tile: products large enough to fill a GPU or TPU, in little of its memory."""
ONE_TILE_BYTES = 256 * 2**20
"""Most bytes of a device's cosines in a single tile; its dloss/dlogits take as much again. A batch
of 8,192 on one device, or 2,048 rows of a batch of 32,768."""
SAVED_BYTES = 512 * 2**20
"""Most bytes of a device's saved cosines: those of 4,096 rows of a batch of 32,768, or of a batch
of 11,585 on one device."""
NEG_INF = -1e30
"""Below every logit, yet finite: -inf - -inf would be NaN where all is masked."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Tiles of at most `size` rows and `size` columns.

    Attributes:
      size: most rows, and most columns, of a tile.
      save_cosines: the cosines of all tiles are held until the backward pass instead of being
        computed again.
    """

    size: int
    save_cosines: bool


def choose_tiling(
    rows_per_device: int, batch_size: int, embed_dim: int, platform: str, *, tile_size: int
) -> Tiling:
    """Return the tiling of a batch: with a `tile_size` that one, cosines not saved; 0 chooses.

    Saving the cosines saves one of four matrix products. A device's are b x B float32 numbers,
    which grow with the square of the batch, and the tiles are there to prevent that: so they are
    saved while they take at most `SAVED_BYTES`. They are also saved up to b = 2 D, where they are
    no more than the gathered texts and their float32 gradient, 2 x B x D numbers on every device.

    Up to `ONE_TILE_BYTES` there is one tile: three large matrix products are quicker than many
    small ones, and what they leave to memory is what the dense form leaves, or less.
    """
    if tile_size:
        return Tiling(tile_size, save_cosines=False)
    cosine_bytes = 4 * rows_per_device * batch_size
    if cosine_bytes <= ONE_TILE_BYTES:
        return Tiling(batch_size, save_cosines=True)
    save_cosines = cosine_bytes <= SAVED_BYTES or rows_per_device <= 2 * embed_dim
    return Tiling(CPU_TILE if platform == "cpu" else ACCELERATOR_TILE, save_cosines)


class Side(NamedTuple):
    """Rows of one modality: a device's images, all the batch's texts, or one tile of either.

    Attributes:
      z: unit features, 0 where a row is invalid.
      row: the rows' numbers in the global batch.
      valid, caption_id: of the rows; no ids where equal captions are not masked.
    """

    z: Float[Array, "rows D"]
    row: Int[Array, " rows"]
    valid: Bool[Array, " rows"]
    caption_id: UInt[Array, " rows"] | None


class Tile(NamedTuple):
    """r images against c texts: their logits, and the masks of positives and negatives."""

    cosine_rc: Float[Array, "r c"]
    logits_rc: Float[Array, "r c"]
    positive_rc: Bool[Array, "r c"]
    negative_rc: Bool[Array, "r c"]

    @property
    def unmasked_rc(self) -> Bool[Array, "r c"]:
        """Return the mask of the positives and the negatives."""
        return self.positive_rc | self.negative_rc

    @property
    def negative_logits_rc(self) -> Float[Array, "r c"]:
        """Return the logits of the negatives, NEG_INF elsewhere."""
        return jnp.where(self.negative_rc, self.logits_rc, NEG_INF)


class Accumulator(NamedTuple):
    """What the forward pass has accumulated of each row, or of each column.

    Attributes:
      running_max: the largest negative's logit, NEG_INF without any.
      total: softmax: sum of exp(logit - running_max) over negatives. sigmoid: sum of the pairs'
        losses over a row, 0 over a column.
    """

    running_max: Array
    total: Array


@dataclasses.dataclass(frozen=True)
class TileLoss:
    """What one loss differs in from another on the same walk.

    Attributes:
      accumulate: (tile, rows so far, columns so far, rows' new running maximum, columns' new
        running maximum) -> (rows' total, columns' total).
      finish: (rows, this device's part of the columns, columns' maximum over all devices, rows'
        positive logits, columns' positive logits, mesh axes) -> (loss of each row, loss of each
        column, log-sum-exp of each row, of each column); a loss whose `dlogits` needs no
        log-sum-exps returns zeros. The positive logit of an invalid row is 0.
      dlogits: (tile, log-sum-exp of its rows, of its columns) -> dloss/dlogits of the summed loss.
      uses_bias: whether the bias is added to the logits; if not, its gradient is exactly 0.
    """

    accumulate: Callable[..., tuple[Array, Array]]
    finish: Callable[..., tuple[Array, Array, Array, Array]]
    dlogits: Callable[[Tile, Array, Array], Array]
    uses_bias: bool


def softmax_accumulate(
    tile: Tile, rows: Accumulator, columns: Accumulator, max_r: Array, max_c: Array
) -> tuple[Array, Array]:
    """Add a tile to the sums of exponentials, each below its maximum: scale 100 cannot overflow.

    Where everything is masked so far the sum counts exp(0)s; the first real maximum, or the
    positive logit in the end, scales them away with exp(NEG_INF - real) = 0.
    """
    total_r = jnp.sum(jnp.exp(tile.negative_logits_rc - max_r[:, None]), axis=1)
    total_c = jnp.sum(jnp.exp(tile.negative_logits_rc - max_c), axis=0)
    total_r += rows.total * jnp.exp(rows.running_max - max_r)
    return total_r, total_c + columns.total * jnp.exp(columns.running_max - max_c)


def softmax_finish(
    rows: Accumulator,
    columns: Accumulator,
    max_B: Array,
    positive_logit_b: Array,
    positive_logit_B: Array,
    axes: tuple[str, ...],
) -> tuple[Array, Array, Array, Array]:
    """Return half the cross entropy of every row and every column, and their log-sum-exps."""
    total_B = lax.psum(columns.total * jnp.exp(columns.running_max - max_B), axes)
    lse_b = jnp.logaddexp(rows.running_max + jnp.log(rows.total), positive_logit_b)
    lse_B = jnp.logaddexp(max_B + jnp.log(total_B), positive_logit_B)
    return (lse_b - positive_logit_b) / 2, (lse_B - positive_logit_B) / 2, lse_b, lse_B


def softmax_dlogits(tile: Tile, lse_r: Array, lse_c: Array) -> Array:
    """Return (softmax over the row + softmax over the column) / 2, minus 1 at a positive."""
    softmaxes_rc = jnp.exp(tile.logits_rc - lse_r[:, None]) + jnp.exp(tile.logits_rc - lse_c)
    return jnp.where(tile.unmasked_rc, softmaxes_rc / 2, 0) - tile.positive_rc


def sigmoid_accumulate(
    tile: Tile, rows: Accumulator, columns: Accumulator, max_r: Array, max_c: Array
) -> tuple[Array, Array]:
    """Add the pairs' losses along the rows alone; the columns would count them again."""
    del max_r, max_c
    pair_loss_rc = jax.nn.softplus(jnp.where(tile.positive_rc, -tile.logits_rc, tile.logits_rc))
    total_r = jnp.sum(jnp.where(tile.unmasked_rc, pair_loss_rc, 0), axis=1)
    return rows.total + total_r, columns.total


def sigmoid_finish(
    rows: Accumulator,
    columns: Accumulator,
    max_B: Array,
    positive_logit_b: Array,
    positive_logit_B: Array,
    axes: tuple[str, ...],
) -> tuple[Array, Array, Array, Array]:
    """Return the rows' sums, which are the loss; `sigmoid_dlogits` needs no log-sum-exps."""
    del columns, positive_logit_b, positive_logit_B, axes
    zero_b, zero_B = jnp.zeros_like(rows.total), jnp.zeros_like(max_B)
    return rows.total, zero_B, zero_b, zero_B


def sigmoid_dlogits(tile: Tile, lse_r: Array, lse_c: Array) -> Array:
    """Return sigmoid(logit), minus 1 at a positive."""
    del lse_r, lse_c
    return jnp.where(tile.unmasked_rc, jax.nn.sigmoid(tile.logits_rc), 0) - tile.positive_rc


SOFTMAX = TileLoss(softmax_accumulate, softmax_finish, softmax_dlogits, uses_bias=False)
SIGMOID = TileLoss(sigmoid_accumulate, sigmoid_finish, sigmoid_dlogits, uses_bias=True)


def make_tile(cosine_rc: Array, images: Side, texts: Side, scale: Array, bias: Array) -> Tile:
    """Return the tile of these cosines: logits and masks beside them."""
    same_row_rc = images.row[:, None] == texts.row
    negative_rc = images.valid[:, None] & texts.valid & ~same_row_rc
    if images.caption_id is not None and texts.caption_id is not None:
        negative_rc &= images.caption_id[:, None] != texts.caption_id
    positive_rc = same_row_rc & images.valid[:, None] & texts.valid
    return Tile(cosine_rc, scale * cosine_rc + bias, positive_rc, negative_rc)


def positive_logits(tile: Tile, images: Side, texts: Side) -> Float[Array, " r"]:
    """Return each image's positive logit, 0 where it is not in this tile or the row is invalid.

    Read off the tile, one cell a row, and not computed apart: where a positive ties with a
    negative they must be equal to the last bit.
    """
    # A tile's columns are numbered without gaps, up to its padding, which is no one's positive.
    column_r1 = jnp.clip(images.row - texts.row[0], 0, texts.row.size - 1)[:, None]
    logit_r = jnp.take_along_axis(tile.logits_rc, column_r1, axis=1)[:, 0]
    positive_r = jnp.take_along_axis(tile.positive_rc, column_r1, axis=1)[:, 0]
    return jnp.where(positive_r, logit_r, 0)


def count_tiles(rows: int, tile_size: int) -> tuple[int, int]:
    """Return (number of tiles, rows of each): as few tiles as fit the size, all equally long.

    Splitting evenly leaves fewer padding rows than tiles: 1,500 rows are 2 x 750 at size 1,024,
    not 1,024 + 476 with 548 of padding. The same for columns.
    """
    tiles = -(-rows // tile_size)
    return tiles, -(-rows // tiles)


def split_rows(arrays: Any, tile_size: int) -> Any:
    """Return arrays [B, ...] as [tiles, c, ...]; padding is 0, hence valid=False, hence masked."""

    def split(x: Array) -> Array:
        tiles, size = count_tiles(x.shape[0], tile_size)
        padding = [(0, tiles * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(tiles, size, *x.shape[1:])

    return jax.tree.map(split, arrays)


def join_rows(tiles: Any, rows: int) -> Any:
    """Return arrays [tiles, c, ...] as [B, ...]: the inverse of `split_rows`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows], tiles)


@dataclasses.dataclass(frozen=True)
class Walk:
    """A loss, the mesh axes that its rows are sharded over, and the tiles it is computed by."""

    loss: TileLoss
    axes: tuple[str, ...]
    tiling: Tiling


def varying(walk: Walk, x: Array) -> Array:
    """Declare that a value differs between devices, as what a scan carries must be declared."""
    return lax.pcast(x, walk.axes, to="varying")


def walk_forward(
    walk: Walk, images: Side, texts: Side, scale: Array, bias: Array
) -> tuple[Accumulator, Accumulator, Array, Array | None]:
    """Visit every tile once.

    Returns:
      The accumulated rows [b], this device's part of the accumulated columns [B], the rows'
      positive logits [b], and the tiles' cosines where they are saved.
    """
    size = walk.tiling.size

    def visit_tile(images_r: Side, carry, tile_columns: tuple[Side, Accumulator]):
        (rows, positive_logit_r), (texts_c, columns) = carry, tile_columns
        cosine_rc = dot_products(images_r.z, texts_c.z)
        tile = make_tile(cosine_rc, images_r, texts_c, scale, bias)
        max_r = jnp.maximum(rows.running_max, jnp.max(tile.negative_logits_rc, axis=1))
        max_c = jnp.maximum(columns.running_max, jnp.max(tile.negative_logits_rc, axis=0))
        total_r, total_c = walk.loss.accumulate(tile, rows, columns, max_r, max_c)
        positive_logit_r += positive_logits(tile, images_r, texts_c)
        saved_rc = cosine_rc if walk.tiling.save_cosines else None
        carry = Accumulator(max_r, total_r), positive_logit_r
        return carry, (Accumulator(max_c, total_c), saved_rc)

    def visit_rows(columns: Accumulator, images_r: Side):
        zero_r = varying(walk, jnp.zeros(images_r.valid.shape))
        start = Accumulator(zero_r + NEG_INF, zero_r), zero_r
        tile_columns = split_rows(texts, size), columns
        (rows, positive_logit_r), (columns, saved_cosines) = lax.scan(
            functools.partial(visit_tile, images_r), start, tile_columns
        )
        return columns, (rows, positive_logit_r, saved_cosines)

    zero_B = varying(walk, split_rows(jnp.zeros(texts.valid.shape), size))
    start = Accumulator(zero_B + NEG_INF, zero_B)
    columns, (rows, positive_logit_b, saved_cosines) = lax.scan(
        visit_rows, start, split_rows(images, size)
    )
    rows, positive_logit_b = join_rows((rows, positive_logit_b), images.valid.size)
    return rows, join_rows(columns, texts.valid.size), positive_logit_b, saved_cosines


def walk_backward(
    walk: Walk,
    images: Side,
    texts: Side,
    scale: Array,
    bias: Array,
    lse_b: Array,
    lse_B: Array,
    saved_cosines: Array | None,
) -> tuple[Array, Array, Array, Array]:
    """Visit every tile a second time, for the gradients of the summed loss.

    Returns:
      Those of this device's images [b, D], and this device's part of those of all texts [B, D], of
      the scale and of the bias; the features' still lack the factor `scale`.
    """
    size, dtype = walk.tiling.size, images.z.dtype

    def product(subscripts: str, dlogits_rc: Array, z: Array) -> Array:
        precision = product_precision(dtype)
        return jnp.einsum(subscripts, dlogits_rc, z.astype(jnp.float32), precision=precision)

    def visit_tile(rows, carry, columns):
        (images_r, lse_r), (dz_image_rD, dscale, dbias) = rows, carry
        texts_c, lse_c, dz_text_cD, saved_rc = columns
        cosine_rc = dot_products(images_r.z, texts_c.z) if saved_rc is None else saved_rc
        tile = make_tile(cosine_rc, images_r, texts_c, scale, bias)
        dlogits_rc = walk.loss.dlogits(tile, lse_r, lse_c)
        dz_image_rD += product("rc,cD->rD", dlogits_rc, texts_c.z)
        dz_text_cD += product("rc,rD->cD", dlogits_rc, images_r.z)
        dscale += jnp.sum(dlogits_rc * cosine_rc)
        dbias += jnp.sum(dlogits_rc) if walk.loss.uses_bias else 0
        return (dz_image_rD, dscale, dbias), dz_text_cD

    def visit_rows(carry, rows):
        (dz_text_BD, dscale, dbias), (images_r, lse_r, saved_rows) = carry, rows
        dz_image_rD = varying(walk, jnp.zeros(images_r.z.shape))
        columns = *split_rows((texts, lse_B), size), dz_text_BD, saved_rows
        (dz_image_rD, dscale, dbias), dz_text_BD = lax.scan(
            functools.partial(visit_tile, (images_r, lse_r)), (dz_image_rD, dscale, dbias), columns
        )
        return (dz_text_BD, dscale, dbias), dz_image_rD

    zero = varying(walk, jnp.zeros(()))
    start = varying(walk, split_rows(jnp.zeros(texts.z.shape), size)), zero, zero
    rows = *split_rows((images, lse_b), size), saved_cosines
    (dz_text_BD, dscale, dbias), dz_image_bD = lax.scan(visit_rows, start, rows)
    dz_image_bD = join_rows(dz_image_bD, images.valid.size)
    return dz_image_bD, join_rows(dz_text_BD, texts.valid.size), dscale, dbias


def local_side(
    z_bD: Array, valid_b: Array, caption_id_b: Array | None, axes: tuple[str, ...]
) -> Side:
    """Return this device's rows, numbered as in the global batch."""
    b = valid_b.size
    row_b = lax.axis_index(axes) * b + jnp.arange(b)
    return Side(zero_invalid(z_bD, valid_b), row_b, valid_b, caption_id_b)


def gather_side(side: Side, axes: tuple[str, ...]) -> Side:
    """Return all devices' rows on every device, in the order of the global batch."""

    def gather(x: Array) -> Array:
        return lax.all_gather(x, axes, tiled=True, to="invarying")

    valid_B = gather(side.valid)
    caption_id_B = None if side.caption_id is None else gather(side.caption_id)
    return Side(gather(side.z), jnp.arange(valid_B.size), valid_B, caption_id_B)


def append_negatives(texts: Side, negatives: Negatives, axes: tuple[str, ...]) -> Side:
    """Return all texts and behind them all devices' negatives, whose numbers no image has.

    They lack a positive, and all else of a column is as it is.
    """
    ids = None if texts.caption_id is None else negatives.caption_id_N
    side = gather_side(local_side(negatives.z_ND, negatives.valid_N, ids, axes), axes)
    side = side._replace(row=side.row + texts.row.size)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), texts, side)


def forward_shard(
    walk: Walk,
    z_image_bD,
    z_text_bD,
    scale,
    bias,
    negatives: Negatives | None,
    valid_b,
    caption_id_b,
):
    """Compute one device's share of the forward pass.

    Returns:
      (LossOutput, gathered texts, log-sum-exps of rows [b] and of columns [C], saved cosines or
      None); C is B, or twice that with negatives.
    """
    axes = walk.axes
    images = local_side(z_image_bD, valid_b, caption_id_b, axes)
    texts = gather_side(local_side(z_text_bD, valid_b, caption_id_b, axes), axes)
    pairs, count = texts.valid.size, count_valid(texts.valid)
    if negatives is not None:
        texts = append_negatives(texts, negatives, axes)
    rows, columns, positive_logit_b, saved_cosines = walk_forward(walk, images, texts, scale, bias)
    max_B = lax.pmax(columns.running_max, axes)
    positive_logit_B = lax.psum(jnp.zeros_like(max_B).at[images.row].set(positive_logit_b), axes)
    loss_b, loss_B, lse_b, lse_B = walk.loss.finish(
        rows, columns, max_B, positive_logit_b, positive_logit_B, axes
    )
    if negatives is not None:
        # A column without a positive has no loss, and in the gradient an exponential of -inf.
        is_pair_B = texts.row < pairs
        loss_B, lse_B = jnp.where(is_pair_B, loss_B, 0), jnp.where(is_pair_B, lse_B, -NEG_INF)

    image_hits = jnp.sum(valid_b & (positive_logit_b > rows.running_max))
    text_hits = jnp.sum((texts.valid & (positive_logit_B > max_B))[:pairs])
    total, image_hits = lax.psum((jnp.sum(loss_b), image_hits), axes)
    total += jnp.sum(loss_B)
    means = (x / count for x in (total, image_hits, text_hits))
    return LossOutput(*means), texts, lse_b, lse_B, saved_cosines


def backward_shard(
    walk: Walk,
    z_image_bD,
    scale,
    bias,
    negatives: Negatives | None,
    valid_b,
    caption_id_b,
    texts: Side,
    lse_b,
    lse_B,
    saved_cosines,
    dloss,
):
    """Compute one device's share of the backward pass from the mean loss's cotangent, `dloss`.

    Returns:
      The gradients of its images [b, D], its texts [b, D], the scale, the bias, and of its
      negatives' features [b, D], or None.
    """
    images = local_side(z_image_bD, valid_b, caption_id_b, walk.axes)
    dz_image_bD, dz_text_BD, dscale, dbias = walk_backward(
        walk, images, texts, scale, bias, lse_b, lse_B, saved_cosines
    )
    pairs = texts.valid.size if negatives is None else texts.valid.size // 2
    dloss /= count_valid(texts.valid[:pairs])

    def of_device(dz_BD: Array) -> Array:
        dz_bD = lax.psum_scatter(dz_BD, walk.axes, tiled=True)
        return (dloss * scale * dz_bD).astype(texts.z.dtype)

    dz_text_bD = of_device(dz_text_BD[:pairs])
    dz_negative_bD = None if negatives is None else of_device(dz_text_BD[pairs:])
    dscale, dbias = lax.psum((dscale, dbias), walk.axes)
    dz_image_bD = (dloss * scale * dz_image_bD).astype(z_image_bD.dtype)
    return dz_image_bD, dz_text_bD, dloss * dscale, dloss * dbias, dz_negative_bD


def shard_walk(walk: Walk, mesh: Mesh) -> Callable[..., LossOutput]:
    """Return both passes under `shard_map` as one function with a gradient."""
    r, a = PartitionSpec(walk.axes), PartitionSpec()  # sharded rows; the same on all devices
    forward: Callable[..., Any] = jax.shard_map(
        functools.partial(forward_shard, walk),
        mesh=mesh,
        in_specs=(r, r, a, a, r, r, r),
        out_specs=(a, a, r, a, r),
    )
    backward: Callable[..., Any] = jax.shard_map(
        functools.partial(backward_shard, walk),
        mesh=mesh,
        in_specs=(r, a, a, r, r, r, a, r, a, r, a),
        out_specs=(r, r, a, a, r),
    )

    # The custom_vjp stands outside both shard_maps, so JAX never transposes one. Transposing
    # decides by itself whether the cotangent of a replicated output is summed or divided over
    # devices, and without check_vma it came out wrong by exactly the device count.
    @jax.custom_vjp
    def tiled(*inputs) -> LossOutput:
        return forward(*inputs)[0]

    def tiled_forward(z_image_BD, z_text_BD, *others):
        output, *residuals = forward(z_image_BD, z_text_BD, *others)
        return output, (z_image_BD, *others, *residuals)

    def tiled_backward(residuals, cotangent: LossOutput):
        *gradients, dz_negative_BD = backward(*residuals, cotangent.loss)
        none: Any = None  # what is no feature has no gradient
        negatives = none if dz_negative_BD is None else Negatives(dz_negative_BD, none, none)
        return *gradients, negatives, none, none

    tiled.defvjp(tiled_forward, tiled_backward)
    return tiled


def make_tiled_loss(
    loss: TileLoss,
    *,
    mesh: Mesh,
    batch_axes: tuple[str, ...],
    platform: str,
    tiling_rule: Callable[[int, int, int, str], Tiling],
) -> Callable[..., LossOutput]:
    """Make a loss over global arrays whose rows are sharded over `batch_axes`, in that order.

    Any further axis of the mesh holds copies. Where no cosines are saved, the largest arrays of a
    device are its tiles, all texts [B, D] and their float32 gradient. Between the passes stay the
    inputs, the log-sum-exps and the gathered texts: the backward pass of a loss comes at once and
    begins with them, so keeping them costs no memory at the peak and saves gathering twice.

    Args:
      loss: what is computed of the tiles.
      mesh, batch_axes: the devices, and the axes whose product shards the rows.
      platform: of the devices that the program is traced for, "cpu" or another.
      tiling_rule: (rows per device, batch size, features, platform) -> Tiling: `choose_tiling`.

    Returns:
      (z_image_BD, z_text_BD, scale, bias, valid_B, caption_id_B or None, negatives or None) ->
      LossOutput, with reverse-mode gradients for the first four and the negatives' features. It
      raises UserError if the rows do not split evenly.
    """
    devices = math.prod(mesh.shape[axis] for axis in batch_axes)

    def loss_fn(
        z_image_BD, z_text_BD, scale, bias, valid_B, caption_id_B, negatives=None
    ) -> LossOutput:
        batch_size, embed_dim = z_image_BD.shape
        if batch_size % devices:
            raise UserError(
                f"a batch of {batch_size} rows does not split over {devices} devices "
                f"({' x '.join(batch_axes)}): take a multiple of {devices}"
            )
        columns = batch_size + (0 if negatives is None else len(negatives.z_ND))
        tiling = tiling_rule(batch_size // devices, columns, embed_dim, platform)
        scale = jnp.asarray(scale, jnp.float32)
        bias = jnp.asarray(bias if loss.uses_bias else 0, jnp.float32)
        tiled = shard_walk(Walk(loss, batch_axes, tiling), mesh)
        return tiled(z_image_BD, z_text_BD, scale, bias, negatives, valid_B, caption_id_B)

    return loss_fn
