"""What is in a set: every sample looked at once, and the account of what was seen.

A `SurveyCounts` holds counts only, so it is small whatever the set, and tallies of parts add up.
"""

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from jaxtyping import Int64

from clip_jax.data.images import MAX_PIXELS, decode_image
from clip_jax.data.shards import BadSampleError, ConcatShards, Handles, Shard, sample_cause
from clip_jax.data.writing.tar_writer import image_suffix, read_sample

MAX_NAMED = 100_000
"""Bad samples that are named; further ones are only counted."""
SIDES = (64, 128, 224, 256, 336, 384, 512, 768, 1024, 2048)
"""Bounds of the histogram of short sides, pixels."""

_CHUNK = 64

TokenLengths = Callable[[list[str]], Sequence[int]]
"""Captions -> tokens of each, its end token among them."""


@dataclass
class SurveyCounts:
    """Counts of the samples that were looked at.

    Attributes:
      bad: cause -> samples that cannot be used; `named` has (cause, "shard/key", details).
      captions: captions an image -> images.
      tokens: length of a caption -> captions.
      sizes: (width, height) -> images.
      kinds: "jpg RGB" -> images.
      labels: class number -> images.
      image_bytes: of all images together, as they are stored.
      numbers: field -> samples that have it as a number; `lows` and `highs` bound its values.
      words: field -> samples that have something else in it.
    """

    looked: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    named: list[tuple[str, str, str]] = field(default_factory=list)
    captions: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    image_bytes: int = 0
    numbers: Counter[str] = field(default_factory=Counter)
    words: Counter[str] = field(default_factory=Counter)
    lows: dict[str, float] = field(default_factory=dict)
    highs: dict[str, float] = field(default_factory=dict)

    def add(self, other: "SurveyCounts") -> None:
        """Take in the tally of another part."""
        for name in (f.name for f in fields(self) if f.name not in ("named", "lows", "highs")):
            mine = getattr(self, name)
            # In place where that is possible: `+` would copy the counts of all before.
            if isinstance(mine, Counter):
                mine.update(getattr(other, name))
            else:
                setattr(self, name, mine + getattr(other, name))
        self.named.extend(other.named[: MAX_NAMED - len(self.named)])
        for name, low in other.lows.items():
            self.lows[name] = min(self.lows.get(name, low), low)
            self.highs[name] = max(self.highs.get(name, low), other.highs[name])


def evenly_spaced(total: int, limit: int | None) -> Int64[np.ndarray, " looked"]:
    """All of `total` places, or `limit` of them at equal distances."""
    if limit is None or limit >= total:
        return np.arange(total)
    return np.arange(limit, dtype=np.int64) * total // limit


def survey(
    indexes: Sequence[Shard],
    rows: Int64[np.ndarray, " rows"],
    token_lengths: TokenLengths,
    *,
    threads: int = 4,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[SurveyCounts]:
    """The tallies of these samples, part by part, in order; every image is decoded whole.

    Args:
      rows: places in the line of all samples.
      token_lengths: called from several threads.
    """
    line = ConcatShards(indexes)

    def look(first: int) -> SurveyCounts:
        tally, texts = SurveyCounts(), []
        with Handles() as handles:
            for row in rows[first : first + _CHUNK].tolist():
                texts += _look(tally, *line.at(row), handles, max_pixels)
        tally.tokens.update(token_lengths(texts) if texts else ())
        return tally

    with ThreadPoolExecutor(threads, thread_name_prefix="survey") as pool:
        chunks = iter(range(0, len(rows), _CHUNK))
        # A few ahead, not all: a billion samples are 16 million parts.
        ahead = deque(pool.submit(look, c) for c in itertools.islice(chunks, 4 * threads))
        try:
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(pool.submit(look, c) for c in itertools.islice(chunks, 1))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _look(
    tally: SurveyCounts, index: Shard, i: int, handles: Handles, max_pixels: int
) -> list[str]:
    """Count one sample; its captions."""
    tally.looked += 1
    try:
        sample = read_sample(index, i, handles)
        image = decode_image(sample.image, max_pixels=max_pixels)
    except (BadSampleError, OSError) as e:
        cause = sample_cause(e)
        tally.bad[cause] += 1
        tally.named.append((cause, f"{index.name}/{index.key(i)}", str(e)[:500]))
        return []
    tally.captions[len(sample.captions)] += 1
    tally.sizes[image.size] += 1
    tally.kinds[f"{image_suffix(sample.image)} {image.mode}"] += 1
    tally.image_bytes += len(sample.image)
    if sample.label >= 0:
        tally.labels[sample.label] += 1
    _count_fields(tally, sample.record)
    return sample.captions


def _count_fields(tally: SurveyCounts, record: dict[str, Any]) -> None:
    for name, value in record.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
            tally.numbers[name] += 1
            tally.lows[name] = min(tally.lows.get(name, value), value)
            tally.highs[name] = max(tally.highs.get(name, value), value)
        elif value is not None:
            tally.words[name] += 1


def quantile(counts: Counter[int], share: float) -> int:
    """The smallest value that so large a share of what was counted does not exceed."""
    wanted, seen = share * counts.total(), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= wanted:
            return value
    return 0


def histogram(counts: Counter[int], bounds: Sequence[int]) -> list[int]:
    """How many values are at most each bound and above the one before; the last is the rest."""
    found = [0] * (len(bounds) + 1)
    for value, count in counts.items():
        found[int(np.searchsorted(bounds, value))] += count
    return found
