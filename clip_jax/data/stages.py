"""Measures each stage between a source and a batch, one at a time and then all together."""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from clip_jax.data.augment import make_decode, make_transform
from clip_jax.data.dataset import TrainingData
from clip_jax.data.decode_processes import decode_processes, decode_threads
from clip_jax.data.images import ImageError
from clip_jax.data.loader import CHUNK_ROWS, bucket_length, make_train_loader
from clip_jax.data.sample_reader import SampleShape
from clip_jax.data.shards import BadSampleError, ConcatShards, Handles, Shard
from clip_jax.data.skip_log import SkipLog
from clip_jax.errors import UserError
from clip_jax.sections import DataSection
from clip_jax.typing import Tokenizer

PARTS = 4
"""Stages that `measure_parts` measures."""
_CACHE_BYTES = 256 << 20  # of encoded images, for the stages behind reading


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: its pairs, and its seconds by the clock and of processors."""

    name: str
    pairs: int
    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        """The pairs a second."""
        return self.pairs / self.seconds

    @property
    def cpu_ms(self) -> float:
        """The milliseconds of processors for one pair."""
        return 1000 * self.cpu_seconds / self.pairs


@dataclasses.dataclass(frozen=True)
class LoaderSettings:
    """What a run would ask of its loader."""

    shape: SampleShape
    batch_size: int
    config: DataSection


def timed(
    name: str,
    work: Callable[[int], int],
    seconds: float,
    cpu_seconds: Callable[[], float] = time.process_time,
) -> Stage:
    """Measure `work(0)`, `work(1)`, ... for so long; each returns how many pairs it dealt with."""
    pairs = calls = 0
    start, cpu = time.perf_counter(), cpu_seconds()
    while True:
        pairs += work(calls)
        calls += 1
        elapsed = time.perf_counter() - start
        if elapsed >= seconds and pairs:
            return Stage(name, pairs, elapsed, cpu_seconds() - cpu)


def measure_parts(
    shards: Sequence[Shard], tokenizer: Tokenizer, settings: LoaderSettings, *, seconds: float
) -> list[Stage]:
    """Measure reading, decoding with the crop, tokenizing, assembling: each alone, in one thread.

    Raises:
      UserError: none of the samples that were tried can be used.
    """
    read = _RandomReader(shards)
    stages = [timed("read", read, seconds)]
    if not read.images:
        raise UserError("no sample could be read; python -m clip_jax.data.inspect says why")
    side, context_length = settings.shape.side, settings.shape.context_length
    decode, transform = make_decode(side, settings.config), make_transform(side, settings.config)
    rng = np.random.default_rng(0)

    def decode_one(call: int) -> int:
        # A bad image takes its time in a run, too.
        with contextlib.suppress(ImageError):
            transform(decode(read.images[call % len(read.images)]), rng)
        return 1

    def tokenize(call: int) -> int:
        first = call * CHUNK_ROWS % len(read.captions)
        texts = read.captions[first : first + CHUNK_ROWS]
        tokenizer(texts, context_length)
        return len(texts)

    parts = [np.zeros((CHUNK_ROWS, side, side, 3), np.uint8)] * -(
        -settings.batch_size // CHUNK_ROWS
    )

    def assemble(call: int) -> int:
        return len(np.concatenate([np.array(part) for part in parts]))

    stages.append(timed("decode and crop", decode_one, seconds))
    stages.append(timed("tokenise", tokenize, seconds))
    stages.append(timed("assemble", assemble, seconds))
    return stages


class _RandomReader:
    """Reads samples in random order, a run of rows at a time as the loader does.

    Attributes:
      images, captions: of the first samples, as many as memory is set aside for.
    """

    def __init__(self, shards: Sequence[Shard]):
        self.images: list[bytes] = []
        self.captions: list[str] = []
        self._free = _CACHE_BYTES
        self._shards = ConcatShards(shards)
        self._rng = np.random.default_rng(0)

    def __call__(self, call: int) -> int:
        with Handles() as handles:
            for row in self._rng.integers(len(self._shards), size=CHUNK_ROWS).tolist():
                shard, i = self._shards.at(row)
                try:
                    captions, image = shard.captions(i, handles), shard.image(i, handles)
                except (BadSampleError, OSError):
                    continue
                if len(image) <= self._free:
                    self._free -= len(image)
                    self.images.append(image)
                    self.captions.append(captions[0])
        return CHUNK_ROWS


def measure_loader(
    shards: Sequence[Shard],
    tokenizer: Tokenizer,
    settings: LoaderSettings,
    *,
    threads: int,
    seconds: float,
) -> tuple[Stage, Counter[int]]:
    """Measure the whole loader with so many threads; count the lengths that batches are trimmed to.

    -1 takes one for every core. The clock starts and ends with a batch that was waited for, so what
    is decoded ahead at the start is no gift: as much of it is there at the end.
    """
    lengths: Counter[int] = Counter()
    data = TrainingData([list(shards)], SkipLog())
    config = dataclasses.replace(settings.config, threads=threads)
    threads = decode_threads(config)
    with make_train_loader(
        data, config, tokenizer, shape=settings.shape, batch_size=settings.batch_size, seed=0
    ) as loader:
        for _ in range(2):
            next(loader)

        def load(call: int) -> int:
            batch = next(loader)
            lengths[bucket_length(batch["text"], tokenizer.eot_id)] += 1
            return len(batch["valid"])

        name = f"loader, {threads} thread" + "s" * (threads != 1)
        if count := decode_processes(config, shards):
            name += f" in {count}"
        return timed(name, load, seconds, loader.cpu_seconds), lengths
