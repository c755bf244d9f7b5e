"""How many pairs each shard of a folder holds, in one small file beside the shards.

With such a file a run knows its order without reading a single shard first: `index.json`, which
`write_index` writes, or `sizes.json`, the file of webdataset and open_clip with nothing but
{shard name: count}. `index.json` holds a line a shard,

    {"format": "clip_jax shards 1", "shards": {
    "00000.tar": [10000, 524288000],
    "00001.tar": [9998, 523999744, {"no_caption": [2, "000010017"]}]}}

its pairs, its bytes and, where its headers show it, what samples lack: how many, and the first.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clip_jax.data.formats.options import split_options
from clip_jax.data.formats.remote import file_system, is_url, read_whole, remote_size
from clip_jax.data.shards import Shard
from clip_jax.errors import UserError, short
from clip_jax.files import atomic_write

INDEX = "index.json"
SIZES = "sizes.json"

_FORMAT = "clip_jax shards 1"
_MAX_BYTES = 1 << 30


class Entry(NamedTuple):
    """One shard: its pairs, its bytes (None: not known), and what samples of it lack."""

    pairs: int
    size: int | None = None
    lacks: Mapping[str, tuple[int, str]] = {}  # cause -> (samples, the first one's key)


def entry_of(shard: Shard) -> Entry:
    """The entry of a shard that was read."""
    lacks = {cause: (len(keys), keys[0]) for cause, keys in shard.incomplete().items() if keys}
    return Entry(len(shard), shard.size, lacks)


def write_index(folder: str | Path, entries: Mapping[str, Entry], *, name: str = INDEX) -> None:
    """Write `index.json` into a folder or below a URL, in the place of an older one.

    Args:
      folder: where the shards lie.
      entries: shard's file name, without its folder -> its entry (see `entry_of`). Shards that
        are not among them are read to be counted, as without an index.
      name: of the file.

    Raises:
      UserError: another program's file has that name, or it cannot be written.
    """
    lines = [
        f"{json.dumps(shard)}: {json.dumps([e.pairs, e.size] + ([e.lacks] if e.lacks else []))}"
        for shard, e in entries.items()
    ]
    head = f'{{"format": {json.dumps(_FORMAT)}, "shards": {{\n'
    text = head + ",\n".join(lines) + "}}\n"
    path = _beside(folder, name)
    older = _read_json(path)
    if older is not None and not _is_ours(older):
        raise UserError(f"{path} is another program's file: move it away to write an index there")
    if not is_url(path):
        with atomic_write(Path(path)) as partial:
            partial.write_text(text, encoding="utf-8")
        return
    try:
        fs, inner = file_system(path)
        fs.pipe_file(inner, text.encode())
    except Exception as e:  # every file system of fsspec has exceptions of its own
        raise UserError(f"{path} cannot be written ({short(e)}); give a folder that can") from e


def read_index(folder: str | Path, *, name: str = INDEX) -> dict[str, Entry]:
    """What `index.json` says, or else `sizes.json`: shard's file name -> entry; {} without either.

    Raises:
      UserError: `index.json` is damaged.
    """
    path = _beside(folder, name)
    found = _read_json(path)
    if _is_ours(found):
        try:
            return {shard: _entry(*row) for shard, row in found["shards"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise _damaged(path, e) from e
    sizes = _read_json(_beside(folder, SIZES)) if name == INDEX else None
    if not isinstance(sizes, dict):
        return {}
    # open_clip takes a count that is written as a string, too.
    counts = {shard: str(count) for shard, count in sizes.items()}
    if not all(count.isascii() and count.isdigit() for count in counts.values()):
        return {}
    return {shard: Entry(int(count)) for shard, count in counts.items()}


def _entry(pairs: Any, size: Any = None, lacks: Any = None) -> Entry:
    if not isinstance(pairs, int) or pairs < 0 or not isinstance(size, int | None):
        raise ValueError(f"{pairs!r}, {size!r}")
    return Entry(pairs, size, {k: (int(n), str(key)) for k, (n, key) in (lacks or {}).items()})


def _beside(folder: str | Path, name: str) -> str:
    return f"{folder}".rstrip("/") + "/" + name if str(folder) else name


def _is_ours(found: Any) -> bool:
    return isinstance(found, dict) and found.get("format") == _FORMAT


def _read_json(path: str) -> Any:
    """The parsed file; None where there is none."""
    if not is_url(path) and not os.path.exists(path):
        return None
    try:
        return json.loads(read_whole(path, _MAX_BYTES))
    except OSError:
        return None  # shards are then counted by reading them
    except (ValueError, RecursionError) as e:
        if path.endswith("/" + SIZES):
            return None
        raise _damaged(path, e) from e


def _damaged(path: str, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({short(error)[:100]}): delete it or write it anew")


KEPT = "data_index.json"
"""The run's own index in its work folder; shards stand in it by their whole paths."""

_RUN = 16


@dataclass(frozen=True)
class Lost:
    """Why a shard cannot be read, and when that was found."""

    cause: str
    detail: str
    since: float


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
