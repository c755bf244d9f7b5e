"""From what the config says of the training data to indexed shards, source by source."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from clip_jax.data.counting import ALONE, Counted, Known, Share, count_shards
from clip_jax.data.filters import filtered, parse_filter, without_repeats
from clip_jax.data.lazy import LazyShard, Resident
from clip_jax.data.shards import Shard
from clip_jax.data.skip_log import SkipLog, on_shard_error
from clip_jax.data.sources import expand, index_shard, index_shards, is_lazy
from clip_jax.errors import UserError


@dataclass(frozen=True)
class TrainingData:
    """The shards of every source, and the account of what is skipped in them."""

    sources: list[list[Shard]]
    log: SkipLog

    @property
    def indexes(self) -> list[Shard]:
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
    resident: int = 0,
    workdir: str = "",
    share: Share = ALONE,
) -> list[list[Shard]]:
    """The shards of every source.

    Args:
      train: one source or several, as `sources.expand` takes them.
      where: conditions on a sample's fields, as `views.parse_filter` takes them; samples that do
        not meet them are not in the data at all.
      unique_keys: keep the first sample of every key, over all sources.
      log: takes the shards that are missing or damaged; without it the first one is an error.
      resident: how many shards may be in memory at once; the others are read when they are needed.
        0 reads all of them now, as `where` and `unique_keys` do.
      workdir, share: see `counting.count_shards`.

    Raises:
      UserError: a source names nothing, or too many of its shards cannot be read.
    """
    conditions = parse_filter(where)
    lazy = resident > 0 and log is not None and not conditions and not unique_keys
    indexes = Known(workdir) if lazy else None
    shared = Resident(resident, index_shard)
    sources: list[list[Shard]] = []
    named = 0
    for pattern in [train] if isinstance(train, str) else train:
        missing: list[str] = []
        shards = expand(
            pattern,
            missing=missing if log is not None else None,
            promised=lambda path: indexes is not None and indexes.get(path) is not None,
        )
        named += len(shards) + len(missing)
        for name in missing:
            assert log is not None
            log.shard("shard_missing", name, "no such file")
        if indexes is not None and log is not None and all(map(is_lazy, shards)):
            counted = count_shards(
                shards, shared.get, indexes, workdir=workdir, share=share, threads=threads
            )
            found = _promised(shards, counted, shared, log)
        else:
            on_error = None if log is None else on_shard_error(log)
            found = index_shards(shards, threads, on_error=on_error)
        if conditions:
            kept = [filtered(shard, conditions) for shard in found]
            if log is not None:
                log.left_out["filtered"] += sum(map(len, found)) - sum(map(len, kept))
            found = kept
        sources.append(found)
    if log is not None:
        log.check_shards(named)
    if unique_keys:
        line = [shard for source in sources for shard in source]
        flat = iter(without_repeats(line, log.repeated) if log else without_repeats(line))
        sources = [[next(flat) for _ in source] for source in sources]
    return sources


def open_line(
    source: Sequence[str], *, log: SkipLog, where: str = "", unique_keys: bool = False
) -> list[Shard]:
    """The shards of all sources, one after the other, for a command that has a `--filter`.

    Raises:
      UserError: as `open_sources`, or no sample is left.
    """
    opened = open_sources(source, where=where, unique_keys=unique_keys, log=log)
    shards = [shard for one in opened for shard in one]
    if not sum(map(len, shards)):
        raise UserError(f"{' and '.join(source)}: no sample" + (" meets --filter" if where else ""))
    return shards


def _promised(
    shards: Sequence[str], counted: Counted, resident: Resident, log: SkipLog
) -> list[Shard]:
    """Each counted shard, to be read when it is needed; the lost ones go to the log."""
    found: list[Shard] = []
    for shard, entry in zip(shards, counted.entries, strict=True):
        if entry is None:
            cause, detail = counted.lost[shard]
            log.shard(cause, shard, detail)
        else:
            found.append(LazyShard(shard, entry, resident))
    return found
