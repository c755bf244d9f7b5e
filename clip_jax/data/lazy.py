"""Shards that are promised by an index and read when the first of their samples is asked for.

A shard that turns out to be missing, damaged or another than was promised loses its samples, each
a row that does not count, and moves no other: the order was made from the promise.
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from clip_jax.data.formats.options import split_options
from clip_jax.data.formats.remote import PASSED_OVER
from clip_jax.data.manifest import Entry, entry_of
from clip_jax.data.shards import BadSampleError, Handles, Shard
from clip_jax.data.skip_log import shard_cause
from clip_jax.errors import UserError


@dataclass(frozen=True)
class Lost:
    """Why a shard cannot be read, and when that was found."""

    cause: str
    detail: str
    since: float


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
        except UserError as e:
            return Lost(shard_cause(e), str(e), time.monotonic())
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
