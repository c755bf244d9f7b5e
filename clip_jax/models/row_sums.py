"""Sums over the rows of all devices, taken before the compiler can put them off.

A gradient of a parameter is such a sum, and nothing waits for it but the update. On several GPUs
the scheduler that hides exchanges puts the sums of whole towers off, and holds the rows for them:
ViT-L/14's step kept 24 arrays of the MLP's width more than it needs. A barrier alone would hold
the backward pass up until the devices have exchanged the sums. So each device's own sums are a
result of their own, which the pass waits for, and are exchanged behind it.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from clip_jax.models.target import Target


def sum_rows_first(
    target: Target,
    function: Callable[..., tuple[Array, ...]],
    rows: tuple[Array, ...],
    waiting: Array,
) -> tuple[tuple[Array, ...], Array]:
    """Return `function(*rows)`, which sums over rows, and `waiting`, made after them on GPUs.

    Args:
      target: the devices.
      function: rows -> arrays that are sums over them.
      rows: arrays with the same first axis.
      waiting: what the backward pass goes on with.
    """
    if not puts_sums_off(target) or not target.shares(len(rows[0])):
        return function(*rows), waiting
    local_sums = target.map_rows(lambda *local: tuple(x[None] for x in function(*local)), rows, ())
    local_sums, waiting = lax.optimization_barrier((local_sums, waiting))
    return tuple(jnp.sum(x, 0) for x in local_sums), waiting


def puts_sums_off(target: Target) -> bool:
    """Return whether the compiler of these devices does so."""
    return target.platform == "cuda" and target.batch_shards > 1 and target.splits_rows_alone
