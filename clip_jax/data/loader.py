"""Batches for the host loop, decoded by Grain's threads.

One Grain element is a run of rows, not one row: an emoji decodes in 0.2 ms, and Grain's own
bookkeeping per element costs about half of that. The position is the step alone, so a loader
made with `start_step=t` gives the batches that an uninterrupted one would have given from t on.

A sample that cannot be used never raises and never moves another: its row travels as a
placeholder with `valid=False`, is counted by cause when its batch is handed out, and is named.
"""

import itertools
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict

import grain
import numpy as np
from jaxtyping import Bool, Int32, UInt8, UInt32

from clip_jax.data.augment import make_decode, make_transform
from clip_jax.data.images import MAX_PIXELS, OPENAI, Preprocess, decode_image, eval_transform
from clip_jax.data.order import BatchOrder, Mixture, Order, Streams
from clip_jax.data.sample_reader import Rows, SampleReader
from clip_jax.data.shards import Shard
from clip_jax.data.skip_log import SkipLog
from clip_jax.errors import UserError
from clip_jax.typing import Tokenizer

BUCKETS = (16, 24, 32, 48, 64, 77)

_CHUNK_ROWS = 32


class Batch(TypedDict, total=False):
    """This host's rows of one global batch; b = batch_size / hosts.

    `label` and `captions` are in evaluation batches only; `key` and `captions` stay on the host.
    """

    image: UInt8[np.ndarray, "b H W 3"]
    text: Int32[np.ndarray, "b L"]
    caption_id: UInt32[np.ndarray, " b"]  # equal captions <=> equal ids, up to 32-bit collisions
    valid: Bool[np.ndarray, " b"]  # False: the row is a placeholder and must not count
    key: list[str]  # "shard/key"
    label: Int32[np.ndarray, " b"]  # class number, -1 when the sample has none
    captions: list[list[str]]  # every caption of the image


class Loader(Iterator[Batch]):
    """Batches, and the account of the samples that could not be used.

    Use it as a context manager, or call `close()`, so that no thread outlives the run.

    Attributes:
      skipped: cause -> rows handed out as placeholders so far (padding is not counted).
      rows: rows handed out so far, padding left out.
      recent: the last of the skipped, as "cause: detail (shard/key)".
      num_steps: batches in all, or None for a loader without an end.
    """

    def __init__(
        self,
        iterator: grain.DatasetIterator[list[Rows]],
        num_steps: int | None,
        evaluation: bool,
        log: SkipLog,
    ):
        self.rows = 0
        self._log = log
        self.skipped: Counter[str] = log.counts
        self.recent: deque[str] = deque(maxlen=32)
        self.num_steps = num_steps
        self._iterator = iterator
        self._evaluation = evaluation

    def __next__(self) -> Batch:
        """The next batch."""
        parts = next(self._iterator)
        for part in parts:
            self.rows += sum(key != "" for key in part.key)
            for cause, key, detail in part.skipped:
                self._log.sample(cause, key, detail)
                self.recent.append(f"{detail} ({key})")
        batch = Batch(
            image=np.concatenate([p.image for p in parts]),
            text=np.concatenate([p.text for p in parts]),
            caption_id=np.concatenate([p.caption_id for p in parts]),
            valid=np.concatenate([p.valid for p in parts]),
            key=[key for p in parts for key in p.key],
        )
        if self._evaluation:
            batch["label"] = np.concatenate([p.label for p in parts])
            batch["captions"] = [captions for p in parts for captions in p.captions]
        return batch

    @property
    def left_out(self) -> dict[str, int]:
        """Samples and whole shards that are not in the data, by cause: the same everywhere."""
        return dict(self._log.left_out + self._log.shards)

    def close(self) -> None:
        """Ends the threads; an image that is being decoded is finished first."""
        self._iterator.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def make_train_loader(
    indexes: Sequence[Shard],
    tokenizer: Tokenizer,
    *,
    image_size: int,
    context_length: int,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_streams: int = 8,
    window: int = 8,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 8,
    prefetch: int = 2,
    crop_scale: tuple[float, float] = (0.9, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.0,
    grayscale: float = 0.0,
    cache_bytes: int = 0,
    repeat: bool = True,
    shards_per_source: Sequence[int] = (),
    weights: Sequence[float] = (),
    max_pixels: int = MAX_PIXELS,
    log: SkipLog | None = None,
) -> Loader:
    """Training batches, in the order of `clip_jax.data.order`.

    Args:
      indexes: the shards, from `sources.open_shards`.
      tokenizer: called from several threads.
      image_size: side of the pictures, in pixels.
      context_length: tokens per caption; `trim_to_bucket` shortens a batch afterwards.
      batch_size: rows of the *global* batch.
      seed: fixes order, crops and the choice among several captions.
      start_step: the first batch's step.
      num_streams, window: see `order.Order`.
      process_index, process_count: this host among the hosts.
      threads: decoding threads; 0 decodes in the calling thread.
      prefetch: batches decoded ahead.
      crop_scale, crop_ratio: see `images.random_resized_crop`.
      flip, grayscale: see `training_pictures.make_transform`.
      cache_bytes: memory for decoded pictures, so that later epochs need not decode them again.
      repeat: False ends after one epoch, in which every sample comes once; the last batch is
        filled up with rows of `valid=False`.
      shards_per_source, weights: with weights, how many of `indexes` belong to each source, and
        the sources' shares; without, all samples count alike.
      max_pixels: larger pictures are not decoded.
      log: takes what is skipped.

    Raises:
      UserError: numbers that do not divide each other, or too few samples.
    """
    order, lengths = _make_order(
        [len(index) for index in indexes],
        shards_per_source,
        weights,
        seed=seed,
        num_streams=num_streams,
        window=window,
    )
    rows = BatchOrder(
        order,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        lengths=None if repeat else lengths,
    )
    reader = SampleReader(
        indexes,
        tokenizer,
        make_transform(image_size, crop_scale, crop_ratio, flip=flip, grayscale=grayscale),
        decode=make_decode(image_size, crop_scale, crop_ratio, max_pixels=max_pixels),
        image_size=image_size,
        context_length=context_length,
        seed=seed,
        cache_bytes=cache_bytes,
    )
    return _make_loader(
        rows.rows_at,
        reader,
        rows=rows.rows,
        steps=(start_step, rows.num_steps),
        threads=threads,
        prefetch=prefetch,
        log=log,
    )


def _make_order(
    sizes: Sequence[int],
    shards_per_source: Sequence[int],
    weights: Sequence[float],
    *,
    seed: int,
    num_streams: int,
    window: int,
) -> tuple[Streams, list[int]]:
    """The streams, and the samples of an epoch of each; a mixture has no epoch of its own."""
    if not weights:
        order = Order(sizes, seed=seed, num_streams=num_streams, window=window)
        return order, [order.stream_length(stream) for stream in range(num_streams)]
    ends = np.cumsum([0, *shards_per_source])
    orders = [
        Order(sizes[first:last], seed=seed, num_streams=num_streams, window=window)
        for first, last in itertools.pairwise(ends)
    ]
    return Mixture(orders, weights, seed=seed), []


def make_eval_loader(
    indexes: Sequence[Shard],
    tokenizer: Tokenizer,
    *,
    image_size: int,
    context_length: int,
    batch_size: int,
    preprocess: Preprocess = OPENAI,
    start_step: int = 0,
    stop_step: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 8,
    prefetch: int = 2,
    max_pixels: int = MAX_PIXELS,
    need_captions: bool = True,
    log: SkipLog | None = None,
) -> Loader:
    """Every sample once, in the order of the shards, through `images.eval_transform`.

    `start_step` and `stop_step` take a part of the batches, by their numbers.

    The last batch is filled up with rows of `valid=False` and an empty key. A sample needs no
    caption here when it has a label, and with `need_captions` False never; of several captions
    `text` holds the first.

    Raises:
      UserError: no samples, or hosts that do not divide the batch.
    """
    total = sum(len(index) for index in indexes)
    if not total:
        raise UserError(f"{len(indexes)} shards hold no sample: check the data pattern")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"evaluation batch_size={batch_size} is not a multiple of the {process_count} hosts:"
            f" use {max(1, batch_size // process_count) * process_count}"
        )
    rows = batch_size // process_count

    def rows_at(step: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        start = step * batch_size + process_index * rows
        ids = np.arange(start + first, start + last)
        return np.where(ids < total, ids, -1), np.zeros_like(ids)

    reader = SampleReader(
        indexes,
        tokenizer,
        lambda image, rng: eval_transform(image, image_size, preprocess, max_pixels=max_pixels),
        decode=lambda data: decode_image(data, max_pixels=max_pixels),
        image_size=image_size,
        context_length=context_length,
        evaluation=True,
        need_captions=need_captions,
    )
    num_steps = -(-total // batch_size)
    stop = num_steps if stop_step is None else min(stop_step, num_steps)
    return _make_loader(
        rows_at,
        reader,
        rows=rows,
        steps=(min(start_step, stop), stop),
        threads=threads,
        prefetch=prefetch,
        log=log,
    )


def _make_loader(
    rows_at: Callable[[int, int, int], tuple[np.ndarray, np.ndarray]],
    reader: SampleReader,
    *,
    rows: int,
    steps: tuple[int, int | None],
    threads: int,
    prefetch: int,
    log: SkipLog | None,
) -> Loader:
    """Grain's part: elements (step, run of rows) -> threads -> the runs of one batch."""
    chunks = -(-rows // _CHUNK_ROWS)
    first_step, last_step = steps

    def read(element: int) -> Rows:
        step, chunk = divmod(int(element), chunks)
        return reader.read(*rows_at(step, chunk * rows // chunks, (chunk + 1) * rows // chunks))

    end = sys.maxsize if last_step is None else last_step * chunks
    dataset = grain.MapDataset.range(first_step * chunks, end).map(read)
    buffer = max(threads, prefetch * chunks) if threads else 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
    batches = dataset.to_iter_dataset(options).batch(chunks, drop_remainder=True, batch_fn=list)
    return Loader(iter(batches), last_step, reader.evaluation, log or SkipLog())


def bucket_length(
    text: Int32[np.ndarray, "b L"], eot_id: int, *, buckets: Sequence[int] = BUCKETS
) -> int:
    """The smallest bucket that holds every caption with its end token; at most L.

    With several hosts, all must take the largest of their answers.
    """
    ends = text == eot_id
    length = text.shape[1]
    # A row without an end token fills its whole context.
    longest = int(np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, length).max(initial=1))
    return min([bucket for bucket in buckets if bucket >= longest] + [length])


def trim_to_bucket(
    text: Int32[np.ndarray, "b L"], eot_id: int, *, buckets: Sequence[int] = BUCKETS
) -> Int32[np.ndarray, "b L2"]:
    """Cuts the padding behind the longest caption, down to a bucket.

    Exact for causal towers read at the end token; few buckets mean few compilations.
    """
    return text[:, : bucket_length(text, eot_id, buckets=buckets)]
