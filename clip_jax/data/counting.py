"""How many samples every shard holds: from an index where there is one, else by reading shards.

What no index knows is counted once: the processes of a run share the reading, and the run keeps
the result in its work folder. An entry whose file has another size by now counts as unknown.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_jax.data.formats.options import split_options
from clip_jax.data.formats.remote import is_url, remote_size
from clip_jax.data.lazy import Lost
from clip_jax.data.manifest import Entry, entry_of, read_index, write_index
from clip_jax.data.shards import Shard

KEPT = "data_index.json"
"""The run's own index in its work folder; shards stand in it by their whole paths."""

_RUN = 16


@dataclass(frozen=True)
class Share:
    """This process among those that count, and how they tell each other."""

    part: int = 0
    parts: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]


ALONE = Share()


@dataclass(frozen=True)
class Counted:
    """Every shard's entry, in the shards' order, or None with the reason in `lost`."""

    entries: list[Entry | None]
    lost: dict[str, tuple[str, str]]  # shard -> (cause, detail)


class Known:
    """What indexes say of a shard by its path: the run's own first, then the one beside it."""

    def __init__(self, workdir: str = ""):
        self._kept = read_index(workdir, name=KEPT) if workdir else {}
        self._folders: dict[str, dict[str, Entry]] = {}

    def get(self, path: str) -> Entry | None:
        """The entry, if there is one; the first of a folder reads that folder's index."""
        entry = self._kept.get(path)
        if entry is None:
            folder, _, name = path.rpartition("/")
            if folder not in self._folders:
                self._folders[folder] = read_index(folder or ".")
            entry = self._folders[folder].get(name)
        return entry


def count_shards(
    shards: Sequence[str],
    read: Callable[[str], Shard | Lost],
    indexes: Known,
    *,
    workdir: str = "",
    share: Share = ALONE,
    threads: int = 8,
) -> Counted:
    """The entries of these shards, the same in all processes; each must call it.

    Args:
      shards: as `sources.expand` names them.
      read: reads a whole shard, which is done only where no index knows it; see `lazy.Resident`.
      indexes: what is known.
      workdir: where process 0 writes what was counted.
      share: of the reading.
      threads: reading in this process.

    Raises:
      UserError: an index is damaged.
    """
    paths = [split_options(shard)[0] for shard in shards]
    found_known = {path: entry for path in paths if (entry := indexes.get(path)) is not None}
    changes: dict[int, list[Any]] = {}
    for known in (found_known, {}):
        mine = range(share.part, len(paths), share.parts)
        found = _count_part(mine, shards, paths, known, read, threads)
        told = share.gather([_digest(known, paths), list(found.items())])
        changes = {int(i): row for _, rows in told for i, row in rows}
        # Where processes have other indexes (copies of the data), nobody uses any.
        if len({digest for digest, _ in told}) == 1:
            break
    lost: dict[str, tuple[str, str]] = {}
    for i, row in changes.items():
        known.pop(paths[i], None)
        if isinstance(row[0], str):
            lost[shards[i]] = row[0], row[1]
        else:
            known[paths[i]] = Entry(row[0], row[1], {k: (n, key) for k, (n, key) in row[2].items()})
    if workdir and len(changes) > len(lost) and share.part == 0:
        kept = {path: known[path] for path in dict.fromkeys(paths) if path in known}
        write_index(workdir, read_index(workdir, name=KEPT) | kept, name=KEPT)
    return Counted([known.get(path) for path in paths], lost)


def _count_part(
    mine: Sequence[int],
    shards: Sequence[str],
    paths: Sequence[str],
    known: Mapping[str, Entry],
    read: Callable[[str], Shard | Lost],
    threads: int,
) -> dict[int, list[Any]]:
    """What of this part is not as the indexes say: place -> [pairs, bytes, lacks], or [cause,
    detail] of a shard that cannot be read."""

    def count(i: int) -> list[Any] | None:
        entry = known.get(paths[i])
        if entry is not None:
            size = _size_now(paths[i], entry)
            if size == entry.size:
                return None
            if entry.size is None:
                return [entry.pairs, size, {}]
        found = read(shards[i])
        if not isinstance(found, Lost):
            return list(entry_of(found))
        # A shard that was promised keeps its places, as rows that do not count.
        return [found.cause, found.detail] if entry is None else None

    # A task of a thread is a run of shards: most of them are known, and looked at in microseconds.
    runs = [mine[k : k + _RUN] for k in range(0, len(mine), _RUN)]
    with ThreadPoolExecutor(threads, thread_name_prefix="index") as pool:
        try:
            told = list(pool.map(lambda run: [(i, count(i)) for i in run], runs))
        finally:
            # After Ctrl-C, do not read the other shards first.
            pool.shutdown(wait=True, cancel_futures=True)
    return {i: row for run in told for i, row in run if row is not None}


def _size_now(path: str, entry: Entry) -> int | None:
    """The file's bytes; those of the entry where it is remote, or cannot be looked at."""
    if entry.size == 0:
        return 0  # nobody can say
    if is_url(path):
        # An index is there to spare a request a shard.
        return remote_size(path) if entry.size is None else entry.size
    try:
        return os.stat(path).st_size
    except OSError:
        return 0 if entry.size is None else entry.size  # a lost shard keeps its places


def _digest(known: Mapping[str, Entry], paths: Sequence[str]) -> str:
    entries = [known.get(path) or Entry(-1) for path in paths]
    numbers = np.array([(e.pairs, -1 if e.size is None else e.size) for e in entries], np.int64)
    return hashlib.blake2b(numbers.tobytes(), digest_size=16).hexdigest()
