"""The order of the samples: a pure function of the seed and a position.

A sample's id is its number among all samples, counted shard after shard. Stream s of S owns the
ids [s*n//S, (s+1)*n//S), so streams are equal to within one sample whatever the shards' sizes,
and there may be fewer shards than streams. A stream's range is cut at shard boundaries into
pieces; every epoch puts the pieces into a new order and then shuffles the samples inside
consecutive windows of `window` pieces, so that a host reads a few shards at a time.

A global batch takes batch_size/S samples of every stream, and its rows are stream-major. Host h
of n owns the streams [h*S/n, (h+1)*S/n) and with them a contiguous run of the rows. Nothing here
depends on the number of hosts or on what was read before, so any step can be computed first.

Of several sources with weights, each has its share of every `MIXTURE_BLOCK` positions of a stream,
and an order with epochs of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from clip_jax.errors import UserError

# Each use of the seed has its own key, so no two draws share a stream of random numbers.
PIECES_KEY, WINDOW_KEY, AUGMENT_KEY, MIXTURE_KEY, WORDS_KEY, NEGATIVE_KEY = 1, 2, 3, 4, 5, 6

MIXTURE_BLOCK = 1024
"""Positions of a block of a mixture, and with them the precision of a weight."""


def permutation(seed: int, *where: int, n: int) -> Int64[np.ndarray, " n"]:
    """Draw a permutation of range(n), the same on every platform and with every numpy.

    Philox's raw words are fixed by its definition, and the rank of distinct words is a uniformly
    random permutation; `Generator.permutation` may change its algorithm between releases.

    Args:
      seed: key of the generator.
      where: the key of the use, then up to three numbers, all integers in [0, 2**64).
      n: length.

    >>> permutation(0, 1, n=5)
    array([3, 2, 4, 1, 0])
    """
    return np.argsort(philox(seed, *where).random_raw(n), kind="stable")


def philox(seed: int, *where: int) -> np.random.Philox:
    """Return Philox at (seed, where); the counter's low word is left to count the draws."""
    use, *numbers = where
    counter = np.zeros(4, np.uint64)
    counter[1 : 1 + len(numbers)] = numbers
    return np.random.Philox(key=np.array([seed, use], np.uint64), counter=counter)


class Uniforms:
    """Uniform numbers in [0, 1) at any place: those of `np.random.Generator(philox(...)).random()`.

    Making a generator takes more than ten times as long as moving one, which is all that this does.
    Not for several threads at once.

    Args:
      seed, use: the key of all the places, as for `philox`.
    """

    _AHEAD = 8
    """Words that are drawn at a time; a training image takes seven if its first crop fits."""

    def __init__(self, seed: int, use: int):
        self._philox = philox(seed, use)
        start: Any = self._philox.state
        # Of lists, from which a state is set in half the time.
        start["state"] = {name: words.tolist() for name, words in start["state"].items()}
        self._start = start | {"buffer": start["buffer"].tolist()}
        self._words: Iterator[int] = iter(())

    def move(self, *where: int) -> None:
        """Go to the first number at a place, which has as many coordinates as all others."""
        self._start["state"]["counter"][1 : 1 + len(where)] = where
        self._philox.state = self._start
        self._words = iter(())

    def random(self) -> float:
        """Return the next number: 53 bits of a word, as numpy makes a double of it."""
        word = next(self._words, None)
        if word is None:
            self._words = iter(self._philox.random_raw(self._AHEAD).tolist())
            word = next(self._words)
        return (word >> 11) * 2.0**-53


@runtime_checkable
class Streams(Protocol):
    """An order of samples in streams: `Order`, or `Mixture`."""

    num_streams: int
    num_samples: int

    def samples_at(
        self, stream: int, position: int, count: int
    ) -> tuple[Int64[np.ndarray, " count"], Int64[np.ndarray, " count"]]:
        """Return (sample ids, epochs) at `count` positions of one stream from `position` on."""
        ...


class Order:
    """Says which sample stands at which position of which stream.

    Methods are pure functions of their arguments; the caches only spare repeating a draw, hold
    one epoch's pieces and a few windows per stream, and may be used from several threads.

    Args:
      shard_sizes: samples in each shard.
      seed: in [0, 2**64).
      num_streams: S, `config.data.streams`.
      window: pieces whose samples are shuffled together.

    Raises:
      UserError: fewer samples than streams, or a number out of range.
    """

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, num_streams: int, window: int):
        sizes = np.asarray(shard_sizes, np.int64)
        self.num_samples = n = int(sizes.sum())
        if num_streams < 1 or window < 1:
            raise UserError(
                f"config.data.streams is {num_streams} and config.data.window {window};"
                " both must be at least 1"
            )
        if not 0 <= seed < 2**64:
            raise UserError(f"config.seed is {seed}; it must be in [0, 2**64)")
        if n < num_streams:
            raise UserError(
                f"{n} samples in {len(sizes)} shards cannot feed {num_streams} streams: set"
                f" config.data.streams to at most {n}, or check the pattern in config.data.train"
            )
        self.seed, self.num_streams, self.window = seed, num_streams, window
        self._shard_starts = np.concatenate([[0], np.cumsum(sizes)])
        self._pieces_of_epoch = lru_cache(maxsize=2 * num_streams)(self._draw_pieces)
        self._samples_of_window = lru_cache(maxsize=2 * num_streams)(self._draw_window)

    def stream_range(self, stream: int) -> tuple[int, int]:
        """Return the ids [first, last) that a stream owns."""
        n, streams = self.num_samples, self.num_streams
        return stream * n // streams, (stream + 1) * n // streams

    def stream_length(self, stream: int) -> int:
        """Return how many samples an epoch of a stream has."""
        first, last = self.stream_range(stream)
        return last - first

    def samples_at(
        self, stream: int, position: int, count: int
    ) -> tuple[Int64[np.ndarray, " count"], Int64[np.ndarray, " count"]]:
        """Return (sample ids, epochs) at `count` positions of one stream from `position` on."""
        first, last = self.stream_range(stream)
        ids = np.empty(count, np.int64)
        epochs = np.empty(count, np.int64)
        done = 0
        while done < count:
            epoch, offset = divmod(position + done, last - first)
            _, window_starts = self._pieces_of_epoch(stream, epoch)
            # Windows are never empty, so the last start not beyond the offset is the window's.
            w = int(np.searchsorted(window_starts, offset, side="right")) - 1
            inside = offset - int(window_starts[w])
            run = self._samples_of_window(stream, epoch, w)[inside : inside + count - done]
            ids[done : done + len(run)] = run
            epochs[done : done + len(run)] = epoch
            done += len(run)
        return ids, epochs

    def _pieces(self, stream: int) -> Int64[np.ndarray, "pieces 2"]:
        """Cut the stream's range at shard boundaries; return [first, last) of each piece."""
        first, last = self.stream_range(stream)
        starts = self._shard_starts
        inner = starts[np.searchsorted(starts, first, "right") : np.searchsorted(starts, last)]
        cuts = np.unique(np.concatenate([[first], inner, [last]]))  # empty shards repeat a start
        return np.stack([cuts[:-1], cuts[1:]], axis=1)

    def _draw_pieces(self, stream: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch's pieces in their order [pieces, 2], and where each window starts."""
        pieces = self._pieces(stream)
        order = permutation(self.seed, PIECES_KEY, stream, epoch, n=len(pieces))
        pieces = pieces[order]
        ends = np.cumsum(pieces[:, 1] - pieces[:, 0])
        return pieces, np.concatenate([[0], ends])[: len(pieces) : self.window]

    def _draw_window(self, stream: int, epoch: int, w: int) -> np.ndarray:
        """Return the sample ids of one window, shuffled."""
        pieces, _ = self._pieces_of_epoch(stream, epoch)
        pieces = pieces[w * self.window : (w + 1) * self.window]
        ids = np.concatenate([np.arange(first, last) for first, last in pieces])
        return ids[permutation(self.seed, WINDOW_KEY, stream, epoch, w, n=len(ids))]


def places_per_block(weights: Sequence[float]) -> list[int]:
    """Return how many positions of a block each source has, by largest remainders.

    Raises:
      UserError: a weight is not above 0, or too small to have a position.
    """
    if any(not 0 < weight < float("inf") for weight in weights):
        raise UserError(f"config.data.weights is {tuple(weights)}; every weight must be above 0")
    exact = np.asarray(weights, np.float64) / sum(weights) * MIXTURE_BLOCK
    counts = np.floor(exact).astype(int)
    rest = MIXTURE_BLOCK - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    if not counts.all():
        raise UserError(
            f"config.data.weights is {tuple(weights)}; the smallest share that can be kept is"
            f" 1/{MIXTURE_BLOCK} of all"
        )
    return counts.tolist()


class Mixture:
    """An order like `Order` over several sources.

    Args:
      orders: one for each source, all with the same number of streams.
      weights: the sources' shares, in any unit.
      seed: fixes which positions of a block belong to which source.

    Raises:
      UserError: the weights are not one for each source, or as for `places_per_block`.
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
        self._counts = places_per_block(weights)
        self._seed = seed
        self._block = lru_cache(maxsize=2 * self.num_streams)(self._draw_block)

    def samples_at(
        self, stream: int, position: int, count: int
    ) -> tuple[Int64[np.ndarray, " count"], Int64[np.ndarray, " count"]]:
        """Return (ids among the samples of all sources, epochs of their source) from `position`."""
        ids = np.empty(count, np.int64)
        epochs = np.empty(count, np.int64)
        done = 0
        while done < count:
            block, offset = divmod(position + done, MIXTURE_BLOCK)
            source, before = self._block(stream, block)
            run = slice(offset, min(MIXTURE_BLOCK, offset + count - done))
            for k, order in enumerate(self._orders):
                inside = np.flatnonzero(source[run] == k)
                if len(inside):
                    first = block * self._counts[k] + int(before[offset + inside[0]])
                    source_ids, source_epochs = order.samples_at(stream, first, len(inside))
                    ids[done + inside] = source_ids + self._starts[k]
                    epochs[done + inside] = source_epochs
            done += run.stop - run.start
        return ids, epochs

    def _draw_block(self, stream: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return each position's source, and how many of that source's come before it."""
        source = np.repeat(np.arange(len(self._counts)), self._counts)
        source = source[permutation(self._seed, MIXTURE_KEY, stream, block, n=MIXTURE_BLOCK)]
        before = np.empty(MIXTURE_BLOCK, np.int64)
        for k, count in enumerate(self._counts):
            before[source == k] = np.arange(count)
        return source, before


@dataclass(frozen=True)
class BatchPart:
    """The part of every global batch that a host loads: number `index` of `count` equal ones."""

    index: int = 0
    count: int = 1


WHOLE_BATCH = BatchPart()


class BatchOrder:
    """Says which samples the rows of one host hold in each global batch.

    Args:
      order: the streams.
      batch_size: rows of the global batch, a multiple of the streams.
      part: this host's; the number of parts divides the streams.
      lengths: positions after which each stream ends; its rows are then padding, of id -1. None
        lets the streams go on for ever.

    Attributes:
      rows: this host's rows of a batch.
      num_steps: batches until every stream has ended, or None.

    Raises:
      UserError: a number that does not divide another.
    """

    def __init__(
        self,
        order: Streams,
        *,
        batch_size: int,
        part: BatchPart = WHOLE_BATCH,
        lengths: Sequence[int] | None = None,
    ):
        streams = order.num_streams
        if batch_size < 1 or batch_size % streams:
            raise UserError(
                f"config.train.batch_size is {batch_size}, not a multiple of config.data.streams,"
                f" {streams}: set it to {max(1, batch_size // streams) * streams}, or change"
                " config.data.streams"
            )
        if streams % part.count:
            raise UserError(
                f"config.data.streams is {streams}, not a multiple of the {part.count} hosts:"
                f" set it to {-(-streams // part.count) * part.count}"
            )
        self._order = order
        self._rows_per_stream = batch_size // streams
        self._first_stream = part.index * streams // part.count
        self._lengths = lengths
        self.rows = batch_size // part.count
        self.num_steps = None if lengths is None else -(-max(lengths) // self._rows_per_stream)

    def rows_at(
        self, step: int, first: int, last: int
    ) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
        """Return (sample ids, epochs) of this host's rows [first, last) of the batch at `step`."""
        per_stream = self._rows_per_stream
        parts = []
        while first < last:
            stream, offset = divmod(first, per_stream)
            count = min(per_stream - offset, last - first)
            position = step * per_stream + offset
            parts.append(self._run(self._first_stream + stream, position, count))
            first += count
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def _run(self, stream: int, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        ids, epochs = self._order.samples_at(stream, position, count)
        if self._lengths is not None:
            ids = np.where(position + np.arange(count) < self._lengths[stream], ids, -1)
        return ids, epochs
