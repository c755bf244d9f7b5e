"""Several sources in fixed shares: the order is still a function of the seed and the position.

The positions of a stream are cut into blocks. In every block each source has the same number of
places, its weight's share of them, and the seed shuffles which places those are. So after b whole
blocks a source of c places a block stands at its own position b * c, whatever was read before.
Each source passes through its own epochs: a small one with a large weight comes round more often.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from clip_jax.data.order import Order, permutation
from clip_jax.errors import UserError

BLOCK = 1024
"""Positions of a block, and with them the precision of a weight."""

_MIX = 4  # this use's key of the seed; 1 to 3 are taken by the order and the augmentation


def places(weights: Sequence[float]) -> list[int]:
    """How many places of a block each source has, by largest remainders.

    Raises:
      UserError: a weight is not above 0, or too small to have a place.
    """
    if any(not 0 < weight < float("inf") for weight in weights):
        raise UserError(f"config.data.weights is {tuple(weights)}; every weight must be above 0")
    exact = np.asarray(weights, np.float64) / sum(weights) * BLOCK
    counts = np.floor(exact).astype(int)
    rest = BLOCK - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    if not counts.all():
        raise UserError(
            f"config.data.weights is {tuple(weights)}; the smallest share that can be kept is"
            f" 1/{BLOCK} of all"
        )
    return counts.tolist()


class Mixture:
    """An order like `order.Order` over several sources.

    Args:
      orders: one for each source, all with the same number of streams.
      weights: the sources' shares, in any unit.
      seed: fixes which places of a block are whose.

    Raises:
      UserError: as `places`.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], *, seed: int):
        if len(orders) != len(weights):
            raise UserError(
                f"config.data.weights has {len(weights)} weights for {len(orders)} sources of"
                " config.data.train: give one for each"
            )
        self.num_streams = orders[0].num_streams
        self.num_samples = sum(order.num_samples for order in orders)
        self._orders = orders
        self._starts = np.cumsum([0, *(order.num_samples for order in orders)])
        self._counts = places(weights)
        self._seed = seed
        self._block = lru_cache(maxsize=2 * self.num_streams)(self._draw_block)

    def samples_at(
        self, stream: int, position: int, count: int
    ) -> tuple[Int64[np.ndarray, " count"], Int64[np.ndarray, " count"]]:
        """(sample ids in the line of all sources, epochs of their source) from `position` on."""
        ids = np.empty(count, np.int64)
        epochs = np.empty(count, np.int64)
        done = 0
        while done < count:
            block, offset = divmod(position + done, BLOCK)
            whose, before = self._block(stream, block)
            run = slice(offset, min(BLOCK, offset + count - done))
            for k, order in enumerate(self._orders):
                mine = np.flatnonzero(whose[run] == k)
                if len(mine):
                    first = block * self._counts[k] + int(before[offset + mine[0]])
                    got = order.samples_at(stream, first, len(mine))
                    ids[done + mine] = got[0] + self._starts[k]
                    epochs[done + mine] = got[1]
            done += run.stop - run.start
        return ids, epochs

    def _draw_block(self, stream: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Whose each place is, and how many of that source's places come before it."""
        whose = np.repeat(np.arange(len(self._counts)), self._counts)
        whose = whose[permutation(self._seed, _MIX, stream, block, n=BLOCK)]
        before = np.empty(BLOCK, np.int64)
        for k, count in enumerate(self._counts):
            before[whose == k] = np.arange(count)
        return whose, before
