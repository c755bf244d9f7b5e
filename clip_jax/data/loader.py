"""Batches for the host loop, decoded by Grain's threads or by the processes that those wait for.

One Grain element is a run of rows, not one row: an emoji decodes in 0.2 ms, and Grain's own
bookkeeping per element costs about half of that. The position is the step alone, so a loader
made with `start_step=t` gives the batches that an uninterrupted one would have given from t on.

A sample that cannot be used never raises and never moves another: its row travels as a
placeholder with `valid=False`, is counted by cause when its batch is handed out, and is named.
"""

import itertools
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypedDict

import grain
import numpy as np
from jaxtyping import Bool, Int, Int32, UInt8, UInt32

from clip_jax.data.batch_buffers import BatchBuffers
from clip_jax.data.dataset import TrainingData
from clip_jax.data.decode_processes import (
    DecodeProcesses,
    decode_processes,
    decode_threads,
)
from clip_jax.data.images import OPENAI, Preprocess
from clip_jax.data.order import WHOLE_BATCH, BatchOrder, BatchPart, Mixture, Order, Streams
from clip_jax.data.sample_reader import (
    DECODING,
    Decoding,
    ReaderSettings,
    Rows,
    SampleReader,
    SampleShape,
    joined_negatives,
    make_eval_reader,
    make_training_reader,
)
from clip_jax.data.shards import ConcatShards, Shard
from clip_jax.data.skip_log import SkipLog
from clip_jax.errors import UserError
from clip_jax.sections import DataSection
from clip_jax.typing import Tokenizer

BUCKETS = (16, 24, 32, 48, 64, 77)
"""Lengths that batches of captions are trimmed to: few, so that few programs are compiled."""
CHUNK_ROWS = 64
"""Rows that a thread reads at a time."""
PREFETCH_BATCHES = 2
"""Batches that are decoded ahead."""
EVAL_THREADS = 8
"""Threads that decode for an evaluation, whose section has no number of its own."""


class Batch(TypedDict, total=False):
    """This host's rows of one global batch; b = batch_size / hosts.

    `label` and `captions` are in evaluation batches only; `key` and `captions` stay on the host.
    `packed` are the captions of `text` as `caption_packing.pack_captions` lays them, where it does;
    `teacher_text` those of a distillation's teachers.
    """

    image: UInt8[np.ndarray, "b H W 3"]
    text: Int32[np.ndarray, "b L"]
    caption_id: UInt32[np.ndarray, " b"]  # equal captions <=> equal ids, up to 32-bit collisions
    valid: Bool[np.ndarray, " b"]  # False: the row is a placeholder and must not count
    key: list[str]  # "shard/key"
    label: Int32[np.ndarray, " b"]  # class number, -1 when the sample has none
    captions: list[list[str]]  # every caption of the image
    packed: dict[str, np.ndarray]
    teacher_text: Int32[np.ndarray, "b L"]
    negative: Int32[np.ndarray, "b L"]  # with config.data.negatives
    negative_id: UInt32[np.ndarray, " b"]
    negative_valid: Bool[np.ndarray, " b"]  # False: the row has none


class Loader(Iterator[Batch]):
    """Batches, and the account of the samples that could not be used.

    Use it as a context manager, or call `close()`, so that no thread outlives the run.

    Attributes:
      skipped: cause -> rows handed out as placeholders so far (padding is not counted).
      rows: rows handed out so far, padding left out.
      recent: the last of the skipped, as "cause: detail (shard/key)".
      num_steps: batches in all, or None for a loader without an end.
      step: of the next batch.
    """

    def __init__(
        self,
        iterator: grain.DatasetIterator[list[Rows]],
        reader: SampleReader | DecodeProcesses,
        *,
        steps: tuple[int, int | None],
        log: SkipLog,
        buffers: BatchBuffers,
    ):
        self.rows = 0
        self.step, self.num_steps = steps
        self._buffers = buffers
        self._reader = reader
        self._log = log
        self.skipped: Counter[str] = log.counts
        self.recent: deque[str] = deque(maxlen=32)
        self._iterator = iterator

    def __next__(self) -> Batch:
        """Return the next batch, and account for its rows."""
        parts = next(self._iterator)
        for part in parts:
            self.rows += sum(key != "" for key in part.key)
            for cause, key, detail in part.skipped:
                self._log.sample(cause, key, detail)
                self.recent.append(f"{detail} ({key})")
        batch = Batch(
            image=self._buffers.take(self.step),
            text=np.concatenate([p.text for p in parts]),
            caption_id=np.concatenate([p.caption_id for p in parts]),
            valid=np.concatenate([p.valid for p in parts]),
            key=[key for p in parts for key in p.key],
        )
        self.step += 1
        if (negatives := joined_negatives(parts)) is not None:
            batch["negative"] = negatives.text
            batch["negative_id"] = negatives.caption_id
            batch["negative_valid"] = negatives.valid
        if labels := [p.label for p in parts if p.label is not None]:
            batch["label"] = np.concatenate(labels)
            batch["captions"] = [captions for p in parts for captions in p.captions or ()]
        return batch

    @property
    def excluded(self) -> dict[str, int]:
        """The samples and whole shards that are not in the data, by cause: the same everywhere."""
        return dict(self._log.excluded + self._log.shard_counts)

    def cpu_seconds(self) -> float:
        """Return the processors' seconds of this process and those that decode for it."""
        there = self._reader.cpu_seconds() if isinstance(self._reader, DecodeProcesses) else 0.0
        return time.process_time() + there

    def close(self) -> None:
        """End threads and processes; an image that is being decoded is finished first.

        One that hangs is given a second.
        """
        self._iterator.close()
        self._reader.close()
        self._buffers.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def make_train_loader(
    data: TrainingData,
    config: DataSection,
    tokenizer: Tokenizer,
    *,
    shape: SampleShape,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    part: BatchPart = WHOLE_BATCH,
    decoding: Decoding = DECODING,
) -> Loader:
    """Return the training batches, in the order of `clip_jax.data.order`.

    Args:
      data: the sources' shards, and the log that takes what is skipped.
      config: everything in it but the sources and what selects their samples. With `repeat` off
        the loader ends after one epoch, in which every sample comes once; its last batch is
        filled up with rows of `valid=False`.
      tokenizer: called from several threads.
      shape: of the rows; `bucket_length` says how far a batch's captions can be cut afterwards.
      batch_size: rows of the *global* batch.
      seed: fixes order, crops and the choice among several captions.
      start_step: the first batch's step.
      part: this host's part of each batch.
      decoding: makes an image of bytes, and a crop of an image.

    Raises:
      UserError: numbers that do not divide each other, or too few samples.
    """
    order, lengths = make_order(data.sources, config, seed)
    rows = BatchOrder(
        order, batch_size=batch_size, part=part, lengths=None if config.repeat else lengths
    )
    return _make_training_loader(
        rows.rows_at,
        data,
        ReaderSettings(tokenizer, shape, config, seed, decoding),
        rows=rows.rows,
        steps=(start_step, rows.num_steps),
    )


def make_listed_loader(
    data: TrainingData,
    config: DataSection,
    tokenizer: Tokenizer,
    *,
    shape: SampleShape,
    seed: int,
    batch_size: int,
    batches: Sequence[tuple[int, int, int]],
) -> Loader:
    """Return given batches of training data, each sample as its epoch crops it.

    Args:
      data, config, tokenizer, shape, seed: as `make_train_loader` takes them.
      batch_size: rows of a batch.
      batches: of each its epoch, its first sample and the one behind its last; what is missing to
        `batch_size` is filled up with rows of `valid=False` and an empty key.
    """

    def rows_at(step: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, start, stop = batches[step]
        ids = np.arange(start + first, start + last)
        return np.where(ids < stop, ids, -1), np.full_like(ids, epoch)

    return _make_training_loader(
        rows_at,
        data,
        ReaderSettings(tokenizer, shape, config, seed),
        rows=batch_size,
        steps=(0, len(batches)),
    )


def _make_training_loader(
    rows_at: Callable[[int, int, int], tuple[np.ndarray, np.ndarray]],
    data: TrainingData,
    settings: ReaderSettings,
    *,
    rows: int,
    steps: tuple[int, int | None],
) -> Loader:
    """Return batches of training data, decoded in this process or in others for it."""
    config, shards = settings.config, ConcatShards(data.shards)
    threads, count = decode_threads(config), decode_processes(config, data.shards)
    buffers = BatchBuffers((rows, *settings.shape.image), shared=count > 0)
    processes = None
    if count:
        processes = DecodeProcesses(settings, shards, buffers, processes=count, threads=threads)
    return _make_loader(
        rows_at,
        make_training_reader(settings, shards) if processes is None else processes,
        buffers,
        rows=rows,
        steps=steps,
        threads=threads,
        log=data.log,
    )


def make_order(
    sources: Sequence[Sequence[Shard]], config: DataSection, seed: int
) -> tuple[Streams, list[int]]:
    """Return the streams, and an epoch's samples of each; a mixture has no epoch of its own."""

    def order_of(shards: Iterable[Shard]) -> Order:
        sizes = [len(shard) for shard in shards]
        return Order(sizes, seed=seed, num_streams=config.streams, window=config.window)

    if config.weights:
        return Mixture([order_of(shards) for shards in sources], config.weights, seed=seed), []
    order = order_of(itertools.chain(*sources))
    return order, [order.stream_length(stream) for stream in range(config.streams)]


def make_eval_loader(
    shards: Sequence[Shard],
    tokenizer: Tokenizer,
    *,
    shape: SampleShape,
    batch_size: int,
    preprocess: Preprocess = OPENAI,
    part: BatchPart = WHOLE_BATCH,
    steps: slice = slice(None),
    threads: int = EVAL_THREADS,
    need_captions: bool = True,
    log: SkipLog | None = None,
) -> Loader:
    """Return batches with every sample once, in the order of the shards.

    The images are whole, through `images.eval_transform`. The last batch is filled up with rows of
    `valid=False` and an empty key.

    Args:
      shards: one after the other.
      tokenizer: called from several threads.
      shape: of the rows.
      batch_size: rows of the *global* batch.
      preprocess: how the model wants its images.
      part: this host's part of each batch.
      steps: the batches to give, by their numbers; all by default.
      threads: decoding threads; 0 decodes in the calling thread.
      need_captions: False does without captions everywhere. Otherwise a sample needs one where it
        has no label; of several, `text` holds the first.
      log: takes what is skipped.

    Raises:
      UserError: no samples, or hosts that do not divide the batch.
    """
    total = sum(len(shard) for shard in shards)
    if not total:
        raise UserError(f"{len(shards)} shards hold no sample: check the data pattern")
    if batch_size < 1 or batch_size % part.count:
        raise UserError(
            f"the evaluation's batch size is {batch_size}, not a multiple of the {part.count}"
            f" hosts: set it to {max(1, batch_size // part.count) * part.count}"
        )
    rows = batch_size // part.count

    def rows_at(step: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        start = step * batch_size + part.index * rows
        ids = np.arange(start + first, start + last)
        return np.where(ids < total, ids, -1), np.zeros_like(ids)

    reader = make_eval_reader(shards, tokenizer, shape, preprocess, need_captions=need_captions)
    start, stop, _ = steps.indices(math.ceil(total / batch_size))
    return _make_loader(
        rows_at,
        reader,
        BatchBuffers((rows, *shape.image)),
        rows=rows,
        steps=(min(start, stop), stop),
        threads=threads,
        log=log,
    )


def _make_loader(
    rows_at: Callable[[int, int, int], tuple[np.ndarray, np.ndarray]],
    reader: SampleReader | DecodeProcesses,
    buffers: BatchBuffers,
    *,
    rows: int,
    steps: tuple[int, int | None],
    threads: int,
    log: SkipLog | None,
) -> Loader:
    """Let Grain's threads read elements (step, run of rows), and gather the runs of each batch."""
    chunks = -(-rows // CHUNK_ROWS)
    first_step, last_step = steps

    def read(element: int) -> Rows:
        step, chunk = divmod(int(element), chunks)
        first, last = chunk * rows // chunks, (chunk + 1) * rows // chunks
        number, image = buffers.of_step(step)
        if isinstance(reader, DecodeProcesses):
            return reader.read(*rows_at(step, first, last), number, first, image[first:last])
        return reader.read(*rows_at(step, first, last), image[first:last])

    end = sys.maxsize if last_step is None else last_step * chunks
    dataset = grain.MapDataset.range(first_step * chunks, end).map(read)
    buffer = max(threads, PREFETCH_BATCHES * chunks) if threads else 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
    batches = dataset.to_iter_dataset(options).batch(chunks, drop_remainder=True, batch_fn=list)
    return Loader(
        iter(batches),
        reader,
        steps=steps,
        log=SkipLog() if log is None else log,
        buffers=buffers,
    )


def caption_lengths(text: Int32[np.ndarray, "b L"], eot_id: int) -> Int[np.ndarray, " b"]:
    """Return the tokens of each row up to its end token; L where it has none."""
    ends = text == eot_id
    return np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, text.shape[1])


def bucket_lengths(context_length: int) -> list[int]:
    """Return all that `bucket_length` may say of captions of this many tokens, shortest first."""
    return [bucket for bucket in BUCKETS if bucket < context_length] + [context_length]


def bucket_length(text: Int32[np.ndarray, "b L"], eot_id: int) -> int:
    """Return the smallest bucket that holds every caption with its end token; at most L.

    With several hosts, all must take the largest of their answers.
    """
    longest = int(caption_lengths(text, eot_id).max(initial=1))
    return min([bucket for bucket in BUCKETS if bucket >= longest] + [text.shape[1]])


def trim_to_bucket(text: Int32[np.ndarray, "b L"], eot_id: int) -> Int32[np.ndarray, "b L2"]:
    """Cut the padding behind the longest caption, down to a bucket.

    That is exact for causal towers read at the end token.
    """
    return text[:, : bucket_length(text, eot_id)]
