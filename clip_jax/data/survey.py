"""What is in a data set: every sample read and decoded once, and counted.

`SurveyCounts` are small whatever the set, and those of its parts add up.
"""

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from jaxtyping import Int64

from clip_jax.data.images import decode_image, image_suffix
from clip_jax.data.shards import BadSampleError, ConcatShards, Handles, Shard, sample_cause
from clip_jax.data.writing.tar_writer import read_sample

MAX_BAD_SAMPLES = 100_000
"""Bad samples that are listed; further ones are only counted."""
SIDES = (64, 128, 224, 256, 336, 384, 512, 768, 1024, 2048)
"""Bounds of the histogram of short sides, pixels."""

_ROWS_PER_PART = 64

TokenLengths = Callable[[list[str]], Sequence[int]]
"""From captions to the tokens of each, its end token among them."""


@dataclass
class SurveyCounts:
    """Counts of the samples that were read.

    Attributes:
      samples: that were read.
      bad: cause -> samples that cannot be used.
      bad_samples: (cause, "shard/key", details) of each, up to `MAX_BAD_SAMPLES`.
      captions: captions an image -> images.
      tokens: length of a caption -> captions.
      sizes: (width, height) -> images.
      formats: "jpg RGB" -> images.
      labels: class number -> images.
      image_bytes: of all images together, as they are stored.
      number_fields: field -> samples that have it as a number.
      minima, maxima: field -> the bounds of its numbers.
      other_fields: field -> samples that have something else in it.
    """

    samples: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    bad_samples: list[tuple[str, str, str]] = field(default_factory=list)
    captions: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    image_bytes: int = 0
    number_fields: Counter[str] = field(default_factory=Counter)
    minima: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    other_fields: Counter[str] = field(default_factory=Counter)

    def add(self, other: "SurveyCounts") -> None:
        """Add the counts of another part."""
        self.samples += other.samples
        self.image_bytes += other.image_bytes
        for name in (f.name for f in fields(self)):
            counts = getattr(self, name)
            if isinstance(counts, Counter):
                counts.update(getattr(other, name))  # in place: `+` would copy all before
        self.bad_samples.extend(other.bad_samples[: MAX_BAD_SAMPLES - len(self.bad_samples)])
        for name, low in other.minima.items():
            self.minima[name] = min(self.minima.get(name, low), low)
        for name, high in other.maxima.items():
            self.maxima[name] = max(self.maxima.get(name, high), high)


def evenly_spaced(total: int, limit: int | None) -> Int64[np.ndarray, " rows"]:
    """Return all of range(total), or `limit` of its numbers at equal distances."""
    if limit is None or limit >= total:
        return np.arange(total)
    return np.arange(limit, dtype=np.int64) * total // limit


def survey(
    shards: Sequence[Shard],
    rows: Int64[np.ndarray, " rows"],
    token_lengths: TokenLengths,
    *,
    threads: int,
) -> Iterator[SurveyCounts]:
    """Yield the counts of these samples, part by part, in order; every image is decoded whole.

    Args:
      shards: one after the other.
      rows: the samples' numbers among those of all shards.
      token_lengths: called from several threads.
      threads: that read and decode.
    """
    samples = ConcatShards(shards)

    def count_part(first: int) -> SurveyCounts:
        counts, captions = SurveyCounts(), []
        with Handles() as handles:
            for row in rows[first : first + _ROWS_PER_PART].tolist():
                captions += _count_sample(counts, *samples.at(row), handles)
        counts.tokens.update(token_lengths(captions) if captions else ())
        return counts

    with ThreadPoolExecutor(threads, thread_name_prefix="survey") as pool:
        starts = iter(range(0, len(rows), _ROWS_PER_PART))
        # A few ahead, not all: a billion samples are 16 million parts.
        ahead = deque(pool.submit(count_part, k) for k in itertools.islice(starts, 4 * threads))
        try:
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(pool.submit(count_part, k) for k in itertools.islice(starts, 1))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _count_sample(counts: SurveyCounts, shard: Shard, i: int, handles: Handles) -> list[str]:
    """Count one sample, and return its captions."""
    counts.samples += 1
    try:
        sample = read_sample(shard, i, handles)
        image = decode_image(sample.image)
    except (BadSampleError, OSError) as e:
        cause = sample_cause(e)
        counts.bad[cause] += 1
        counts.bad_samples.append((cause, f"{shard.name}/{shard.key(i)}", str(e)[:500]))
        return []
    counts.captions[len(sample.captions)] += 1
    counts.sizes[image.size] += 1
    counts.formats[f"{image_suffix(sample.image)} {image.mode}"] += 1
    counts.image_bytes += len(sample.image)
    if sample.label >= 0:
        counts.labels[sample.label] += 1
    _count_fields(counts, sample.record)
    return sample.captions


def _count_fields(counts: SurveyCounts, record: dict[str, Any]) -> None:
    for name, value in record.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
            counts.number_fields[name] += 1
            counts.minima[name] = min(counts.minima.get(name, value), value)
            counts.maxima[name] = max(counts.maxima.get(name, value), value)
        elif value is not None:
            counts.other_fields[name] += 1


def quantile(counts: Counter[int], share: float) -> int:
    """Return the smallest value that so large a share of what was counted does not exceed."""
    wanted, seen = share * counts.total(), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= wanted:
            return value
    return 0


def histogram(counts: Counter[int], bounds: Sequence[int]) -> list[int]:
    """Count the values that are at most each bound and above the one before; at last the rest."""
    bins = [0] * (len(bounds) + 1)
    for value, count in counts.items():
        bins[int(np.searchsorted(bounds, value))] += count
    return bins
