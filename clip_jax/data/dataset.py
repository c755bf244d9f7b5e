"""The shards of a training set: opened source by source as the config says, or read when needed.

`open_sources` counts the shards first (`clip_jax.data.manifest`). Those that a format allows it for
are then `LazyShard`s, of which only the counts are in memory until one of their samples is asked
for; a `ShardCache` bounds how many are there at once.
"""

import hashlib
import json
import math
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from clip_jax.data.filters import Condition, drop_repeated_keys, filter_shard, parse_filter
from clip_jax.data.formats.errors import ShardError
from clip_jax.data.formats.options import split_options
from clip_jax.data.formats.remote import PASSED_OVER
from clip_jax.data.manifest import (
    ONE_PROCESS,
    ManifestReader,
    ProcessShare,
    ShardEntry,
    UnreadableShard,
    count_shards,
    entry_of,
    members_digest,
)
from clip_jax.data.shards import PROGRAMMING_ERRORS, BadSampleError, Handles, Shard
from clip_jax.data.skip_log import SkipLog, on_shard_error
from clip_jax.data.sources import expand, is_lazy, open_shard, open_shards
from clip_jax.errors import UserError


class ShardCache:
    """Keeps at most `limit` shards in memory, from which the longest unused goes first.

    The limit must hold all shards that are read from in turns, a window of every stream, or
    else each sample would read its shard's headers again.
    """

    def __init__(self, limit: int, read: Callable[[str], Shard]):
        self.limit, self._read = limit, read
        self._lock = threading.Lock()
        self._futures: OrderedDict[str, Future[Shard | UnreadableShard]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._futures)

    def get(
        self, shard: str, read: Callable[[str], Shard] | None = None
    ) -> Shard | UnreadableShard:
        """Return the shard, read by the first thread that asks while the others wait for it.

        One that could not be read is tried again after `remote.PASSED_OVER` seconds.

        Args:
          shard: its name.
          read: reads it here and now, instead of the cache's own way.
        """
        with self._lock:
            future = self._futures.get(shard)
            is_first = future is None
            if future is None:
                future = self._futures[shard] = Future()
            self._futures.move_to_end(shard)
            while len(self._futures) > self.limit:
                self._futures.popitem(last=False)
        if is_first:
            try:
                future.set_result(self._read_or_blame(shard, read or self._read))
            except BaseException as e:
                future.set_exception(e)  # or else the others would wait for ever
                raise
        result = future.result()
        if isinstance(result, UnreadableShard) and time.monotonic() - result.since > PASSED_OVER:
            with self._lock:
                if self._futures.get(shard) is future:
                    del self._futures[shard]
            return self.get(shard, read)
        return result

    def _read_or_blame(self, shard: str, read: Callable[[str], Shard]) -> Shard | UnreadableShard:
        try:
            return read(shard)
        except ShardError as e:
            return UnreadableShard(e.cause, str(e), time.monotonic())
        except PROGRAMMING_ERRORS:
            raise
        except Exception as e:
            detail = f"{shard}: {type(e).__name__}: {e}"
            return UnreadableShard("shard_damaged", detail, time.monotonic())


class LazyShard:
    """A shard of which only the counts are in memory until one of its samples is read."""

    __slots__ = ("_cache", "_checked", "entry", "shard")

    def __init__(self, shard: str, entry: ShardEntry, cache: ShardCache):
        self.shard, self.entry, self._cache = shard, entry, cache
        self._checked: Callable[[], Shard | None] = lambda: None

    @property
    def name(self) -> str:
        return os.path.basename(split_options(self.shard)[0])

    @property
    def size(self) -> int:
        return self.entry.size or 0

    def __len__(self) -> int:
        return self.entry.pairs

    @property
    def cached_shards(self) -> int:
        """The most shards that are in memory with this one."""
        return self._cache.limit

    def load(self, read: Callable[[str], Shard] | None = None) -> Shard:
        """Return the shard itself; where it cannot be read, one whose every sample says why.

        Args:
          read: how, if it is not in memory; see `ShardCache.get`.
        """
        try:
            return self._read(read)
        except BadSampleError as e:
            return LostShard(self.name, self.size, len(self), e)

    def key(self, i: int) -> str:
        """Return the key; `#i` where the shard cannot be read."""
        return self.load().key(i)

    def image(self, i: int, handles: Handles) -> bytes:
        return self._read().image(i, handles)

    def captions(self, i: int, handles: Handles) -> list[str]:
        return self._read().captions(i, handles)

    def label(self, i: int, handles: Handles) -> int:
        return self._read().label(i, handles)

    def record(self, i: int, handles: Handles) -> dict[str, Any]:
        return self._read().record(i, handles)

    def incomplete(self) -> dict[str, list[str]]:
        """Return the first key of each cause: a manifest holds no more."""
        return {cause: [first] for cause, (_, first) in self.entry.lacks.items()}

    def _read(self, read: Callable[[str], Shard] | None = None) -> Shard:
        """Raise BadSampleError if the shard cannot be read, or is not as it was counted."""
        shard = self._cache.get(self.shard, read)
        if isinstance(shard, UnreadableShard):
            raise BadSampleError(shard.cause, shard.detail)
        if self._checked() is shard:  # a digest goes through all keys
            return shard
        pairs, size, _, digest = self.entry
        is_other = digest is not None and members_digest(shard) not in (None, digest)
        if len(shard) != pairs or (size and shard.size != size) or is_other:
            raise BadSampleError(
                "shard_changed",
                f"shard {self.shard} holds {len(shard)} pairs in {shard.size} bytes, not {pairs} in"
                f" {size or 'some'} as it was counted{' (or others)' if is_other else ''}: write"
                " index.json anew, and begin a new run",
            )
        self._checked = weakref.ref(shard)
        return shard


@dataclass(frozen=True, eq=False)
class LostShard:
    """A shard of which no sample can be read, and the error that each of them raises."""

    name: str
    size: int
    pairs: int
    error: BadSampleError

    def __len__(self) -> int:
        return self.pairs

    def key(self, i: int) -> str:
        """Return a name for a sample whose key is not known."""
        return f"#{i}"

    def image(self, i: int, handles: Handles) -> bytes:
        raise self._again()

    def captions(self, i: int, handles: Handles) -> list[str]:
        raise self._again()

    def captions_beside(self, suffix: str, i: int, handles: Handles) -> list[str]:
        raise self._again()

    def label(self, i: int, handles: Handles) -> int:
        raise self._again()

    def record(self, i: int, handles: Handles) -> dict[str, Any]:
        raise self._again()

    def incomplete(self) -> dict[str, list[str]]:
        """Return nothing: nothing is known."""
        return {}

    def _again(self) -> BadSampleError:
        """Return a new error: one that threads raise at once would grow its traceback."""
        return BadSampleError(self.error.cause, self.error.detail)


@dataclass(frozen=True)
class TrainingData:
    """The shards of every source, and the account of what is skipped in them."""

    sources: list[list[Shard]]
    log: SkipLog

    @property
    def shards(self) -> list[Shard]:
        """The shards of all sources, one source after the other."""
        return [shard for source in self.sources for shard in source]


def incomplete_samples(shards: Sequence[Shard]) -> dict[str, tuple[int, str]]:
    """Return what samples are known to lack: cause -> (how many, the first as "shard/key")."""
    causes: dict[str, tuple[int, str]] = {}
    for shard in shards:
        entry = shard.entry if isinstance(shard, LazyShard) else entry_of(shard)
        for cause, (count, first) in entry.lacks.items():
            before, name = causes.get(cause, (0, f"{shard.name}/{first}"))
            causes[cause] = before + count, name
    return causes


def contents_fingerprint(shards: Sequence[Shard]) -> str | None:
    """Hash what the shards hold, as far as their tables of members tell; None if one has none.

    A member of the same name, place and length may still have other bytes.
    """
    state = hashlib.blake2b(digest_size=16)
    for shard in shards:
        digest = shard.entry.digest if isinstance(shard, LazyShard) else members_digest(shard)
        if digest is None:
            return None
        state.update(json.dumps([shard.name, digest]).encode())
    return state.hexdigest()


def steps_per_epoch(pairs: int, batch_size: int, num_streams: int) -> int:
    """Return after how many batches the longest stream has given every sample once."""
    longest = math.ceil(pairs / num_streams)
    return math.ceil(longest / (batch_size // num_streams))


def open_sources(
    train: str | Sequence[str],
    *,
    where: str = "",
    unique_keys: bool = False,
    log: SkipLog | None = None,
    cached_shards: int = 0,
    workdir: str = "",
    share: ProcessShare = ONE_PROCESS,
) -> list[list[Shard]]:
    """Open the shards of every source.

    Args:
      train: one source or several, as `sources.expand` takes them.
      where: conditions on a sample's fields, as `filters.parse_filter` takes them; samples that do
        not meet them are not in the data at all.
      unique_keys: keep the first sample of every key, over all sources.
      log: takes the shards that are missing or damaged; without it the first one is an error.
      cached_shards: how many shards may be in memory at once; the others are read when they are
        needed. 0 reads all of them now, as `where` and `unique_keys` do.
      workdir, share: see `manifest.count_shards`.

    Raises:
      UserError: a source names nothing, or too many of its shards cannot be read.
    """
    patterns = [train] if isinstance(train, str) else train
    conditions = parse_filter(where)
    if cached_shards and log is not None and not conditions and not unique_keys:
        manifests, cache = ManifestReader(workdir), ShardCache(cached_shards, open_shard)
        sources = [
            _open_lazily(pattern, manifests, cache, log, workdir=workdir, share=share)
            for pattern in patterns
        ]
    else:
        sources = [_open_now(pattern, log) for pattern in patterns]
    if log is not None:
        log.check_shards(sum(map(len, sources)))
    if conditions:
        sources = [_filtered(source, conditions, log) for source in sources]
    if unique_keys:
        shards = [shard for source in sources for shard in source]
        rest = iter(drop_repeated_keys(shards, log.repeated_key if log else None))
        sources = [[next(rest) for _ in source] for source in sources]
    return sources


def open_all_shards(
    source: Sequence[str], *, log: SkipLog, where: str = "", unique_keys: bool = False
) -> list[Shard]:
    """Open the shards of all sources, one after the other, for a command that has a `--filter`.

    Raises:
      UserError: as `open_sources`, or no sample is left.
    """
    sources = open_sources(source, where=where, unique_keys=unique_keys, log=log)
    shards = [shard for one in sources for shard in one]
    if not sum(map(len, shards)):
        raise _no_sample(source, log, where)
    return shards


def _no_sample(source: Sequence[str], log: SkipLog, where: str) -> UserError:
    """Make the error of sources without a sample: why the shards cannot be read, if that is it."""
    lost = [
        detail if name in detail else f"{name}: {detail or cause}"
        for cause, name, detail in log.excluded_shards
    ]
    if where or not lost:
        because = f"; {lost[0]}" if lost else ""
        meets = " meets --filter" if where else ""
        return UserError(f"{' and '.join(source)}: no sample{meets}{because}")
    more = f" (and {len(lost) - 1} more shards cannot be read)" if len(lost) > 1 else ""
    return UserError(lost[0] + more)


def _open_now(pattern: str, log: SkipLog | None) -> list[Shard]:
    """Read every shard of a source; those that cannot be read go to the log."""
    if log is None:
        return open_shards(expand(pattern))
    return open_shards(_expand(pattern, log), on_error=on_shard_error(log))


def _open_lazily(
    pattern: str,
    manifests: ManifestReader,
    cache: ShardCache,
    log: SkipLog,
    *,
    workdir: str,
    share: ProcessShare,
) -> list[Shard]:
    """Count every shard of a source, to be read when it is needed where its format allows it."""
    names = _expand(pattern, log, listed=lambda path: manifests.get(path) is not None)
    if not all(map(is_lazy, names)):
        return open_shards(names, on_error=on_shard_error(log))
    counts = count_shards(names, cache.get, manifests, workdir=workdir, share=share)
    shards: list[Shard] = []
    for name, entry in zip(names, counts.entries, strict=True):
        if entry is None:
            cause, detail = counts.unreadable[name]
            log.shard(cause, name, detail)
        else:
            shards.append(LazyShard(name, entry, cache))
    return shards


def _expand(
    pattern: str, log: SkipLog, listed: Callable[[str], bool] = lambda path: False
) -> list[str]:
    """Return the shards that a source names; those that are missing go to the log."""
    missing: list[str] = []
    names = expand(pattern, missing=missing, listed=listed)
    for name in missing:
        log.shard("shard_missing", name, "no such file")
    return names


def _filtered(
    shards: Sequence[Shard], conditions: Sequence[Condition], log: SkipLog | None
) -> list[Shard]:
    """Return the shards with the samples that meet the conditions; the log counts the others."""
    rest = [filter_shard(shard, conditions) for shard in shards]
    if log is not None:
        log.excluded["filtered"] += sum(map(len, shards)) - sum(map(len, rest))
    return rest
