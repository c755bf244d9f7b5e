"""From what the config says of the training data to indexed shards, source by source."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from clip_jax.data.faults import SkipLog, on_shard_error
from clip_jax.data.samples import ShardIndex
from clip_jax.data.sources import expand, index_shards
from clip_jax.data.views import filtered, parse_filter, without_repeats


@dataclass(frozen=True)
class TrainingData:
    """The shards of every source, and the account of what is skipped in them."""

    sources: list[list[ShardIndex]]
    log: SkipLog

    @property
    def indexes(self) -> list[ShardIndex]:
        """All shards, in one line."""
        return [shard for source in self.sources for shard in source]

    @property
    def shards_per_source(self) -> list[int]:
        """How many of `indexes` belong to each source."""
        return [len(source) for source in self.sources]


def steps_of_one_pass(pairs: int, batch_size: int, num_streams: int) -> int:
    """Batches until the longest stream has given every sample once."""
    longest = math.ceil(pairs / num_streams)
    return math.ceil(longest / (batch_size // num_streams))


def open_sources(
    train: str | Sequence[str],
    *,
    where: str = "",
    unique_keys: bool = False,
    log: SkipLog | None = None,
    threads: int = 8,
) -> list[list[ShardIndex]]:
    """The shards of every source.

    Args:
      train: one source or several, as `sources.expand` takes them.
      where: conditions on a sample's fields, as `views.parse_filter` takes them; samples that do
        not meet them are not in the data at all.
      unique_keys: keep the first sample of every key, over all sources.
      log: takes the shards that are missing or damaged; without it the first one is an error.

    Raises:
      UserError: a source names nothing, or too many of its shards cannot be read.
    """
    conditions = parse_filter(where)
    sources: list[list[ShardIndex]] = []
    named = 0
    for pattern in [train] if isinstance(train, str) else train:
        missing: list[str] = []
        shards = expand(pattern, missing=missing if log is not None else None)
        named += len(shards) + len(missing)
        if log is None:
            found = index_shards(shards, threads)
        else:
            for name in missing:
                log.shard("shard_missing", name, "no such file")
            found = index_shards(shards, threads, on_error=on_shard_error(log))
        sources.append([filtered(shard, conditions) for shard in found] if conditions else found)
    if log is not None:
        log.check_shards(named)
    if unique_keys:
        flat = iter(without_repeats([shard for source in sources for shard in source]))
        sources = [[next(flat) for _ in source] for source in sources]
    return sources
