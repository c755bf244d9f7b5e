"""From what the config says of the training data to indexed shards, source by source."""

import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from clip_jax.data.filters import filtered, parse_filter, without_repeats
from clip_jax.data.formats.errors import ShardError
from clip_jax.data.formats.options import split_options
from clip_jax.data.formats.remote import PASSED_OVER
from clip_jax.data.manifest import ALONE, Counted, Entry, Known, Lost, Share, count_shards, entry_of
from clip_jax.data.shards import PROGRAMMING_ERRORS, BadSampleError, Handles, Shard
from clip_jax.data.skip_log import SkipLog, on_shard_error
from clip_jax.data.sources import expand, is_lazy, open_shard, open_shards
from clip_jax.errors import UserError


class Resident:
    """The shards that are read: at most `limit`, from which the longest unused goes first.

    The limit must hold all shards that are read from in turns, a window of every stream, or
    else each sample would read its shard's headers again.
    """

    def __init__(self, limit: int, read: Callable[[str], Shard]):
        self._limit, self._read = limit, read
        self._lock = threading.Lock()
        self._shards: OrderedDict[str, Future[Shard | Lost]] = OrderedDict()

    def get(self, shard: str) -> Shard | Lost:
        """The shard, read by the first thread that asks while the others wait for it."""
        with self._lock:
            future = self._shards.get(shard)
            mine = future is None
            if future is None:
                future = self._shards[shard] = Future()
            self._shards.move_to_end(shard)
            while len(self._shards) > self._limit:
                self._shards.popitem(last=False)
        if mine:
            try:
                future.set_result(self._outcome(shard))
            except BaseException as e:
                future.set_exception(e)  # or else the others would wait for ever
                raise
        found = future.result()
        if isinstance(found, Lost) and time.monotonic() - found.since > PASSED_OVER:
            with self._lock:
                if self._shards.get(shard) is future:
                    del self._shards[shard]
            return self.get(shard)
        return found

    def _outcome(self, shard: str) -> Shard | Lost:
        try:
            return self._read(shard)
        except ShardError as e:
            return Lost(e.cause, str(e), time.monotonic())
        except PROGRAMMING_ERRORS:
            raise
        except Exception as e:
            return Lost("shard_damaged", f"{shard}: {type(e).__name__}: {e}", time.monotonic())


class LazyShard:
    """A `samples.ShardIndex` of which only the entry in an index is in memory."""

    __slots__ = ("_resident", "entry", "shard")

    def __init__(self, shard: str, entry: Entry, resident: Resident):
        self.shard, self.entry, self._resident = shard, entry, resident

    @property
    def name(self) -> str:
        return os.path.basename(split_options(self.shard)[0])

    @property
    def size(self) -> int:
        return self.entry.size or 0

    def __len__(self) -> int:
        return self.entry.pairs

    def key(self, i: int) -> str:
        """The key; `#i` where the shard is lost."""
        try:
            return self._read().key(i)
        except BadSampleError:
            return f"#{i}"

    def image(self, i: int, handles: Handles) -> bytes:
        return self._read().image(i, handles)

    def captions(self, i: int, handles: Handles) -> list[str]:
        return self._read().captions(i, handles)

    def label(self, i: int, handles: Handles) -> int:
        return self._read().label(i, handles)

    def record(self, i: int, handles: Handles) -> dict[str, Any]:
        return self._read().record(i, handles)

    def incomplete(self) -> dict[str, list[str]]:
        """The first key of each cause: more is not kept in an index."""
        return {cause: [first] for cause, (_, first) in self.entry.lacks.items()}

    def _read(self) -> Shard:
        """Raises Unusable where the shard is lost, or is not the one that was promised."""
        found = self._resident.get(self.shard)
        if isinstance(found, Lost):
            raise BadSampleError(found.cause, found.detail)
        pairs, size, _ = self.entry
        if len(found) != pairs or (size and found.size != size):
            raise BadSampleError(
                "shard_changed",
                f"shard {self.shard} holds {len(found)} pairs in {found.size} bytes and its index"
                f" says {pairs} in {size or 'some'}: write the index anew, and begin a new run",
            )
        return found


def lacking(shards: Sequence[Shard]) -> dict[str, tuple[int, str]]:
    """What samples are known to lack: cause -> (how many, the first as "shard/key")."""
    found: dict[str, tuple[int, str]] = {}
    for shard in shards:
        entry = shard.entry if isinstance(shard, LazyShard) else entry_of(shard)
        for cause, (count, first) in entry.lacks.items():
            before, name = found.get(cause, (0, f"{shard.name}/{first}"))
            found[cause] = before + count, name
    return found


@dataclass(frozen=True)
class TrainingData:
    """The shards of every source, and the account of what is skipped in them."""

    sources: list[list[Shard]]
    log: SkipLog

    @property
    def shards(self) -> list[Shard]:
        """The shards of all sources, one source after the other."""
        return [shard for source in self.sources for shard in source]


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
    shared = Resident(resident, open_shard)
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
            found = open_shards(shards, threads, on_error=on_error)
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
