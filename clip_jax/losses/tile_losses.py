"""What the tiled walk needs of a loss: how a tile is summed, what sums come to, and its slope."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

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
