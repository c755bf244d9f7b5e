"""How many pairs each shard holds: the manifest files that say so, and the counting of the others.

With a manifest beside the shards a run knows its order without reading a single shard first. It
is `index.json`, which `write_manifest` writes, or `sizes.json`, the file of webdataset and
open_clip with nothing but {shard name: count}. `index.json` holds a line a shard::

    {"format": "clip_jax shards 1", "shards": {
    "00000.tar": [10000, 524288000],
    "00001.tar": [9998, 523999744, {"no_caption": [2, "000010017"]}]}}

its pairs, its bytes and, where its headers show it, what samples lack: how many, and the first.
A fourth value is the digest of a tar's members: their names and places, not their contents.

`count_shards` reads the shards that no manifest names, each in one of a run's processes, and keeps
their counts in a manifest of the run's own, so that a run which goes on reads none.
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
from clip_jax.data.shards import OPEN_THREADS, HasDigest, Shard
from clip_jax.errors import UserError, short
from clip_jax.files import atomic_write

MANIFEST_FILENAME = "index.json"
SIZES_FILENAME = "sizes.json"
RUN_MANIFEST_FILENAME = "data_index.json"
"""The run's own manifest in its work folder; shards stand in it by their whole paths."""

_FORMAT = "clip_jax shards 1"
_MAX_BYTES = 1 << 30
_SHARDS_PER_TASK = 16


class ShardEntry(NamedTuple):
    """One shard: its pairs, its bytes (None: not known), what samples lack, and its members."""

    pairs: int
    size: int | None = None
    lacks: Mapping[str, tuple[int, str]] = {}  # cause -> (samples, the first one's key)
    digest: str | None = None  # of the members' table, where it was read


def entry_of(shard: Shard) -> ShardEntry:
    """Return the entry of a shard that was read."""
    lacks = {cause: (len(keys), keys[0]) for cause, keys in shard.incomplete().items() if keys}
    return ShardEntry(len(shard), shard.size, lacks, members_digest(shard))


def members_digest(shard: Shard) -> str | None:
    """Return a hash of a shard's keys and of where its members lie; None for formats without."""
    return shard.digest() if isinstance(shard, HasDigest) else None


def write_manifest(
    folder: str | Path, entries: Mapping[str, ShardEntry], *, name: str = MANIFEST_FILENAME
) -> None:
    """Write `index.json` into a folder or below a URL, in the place of an older one.

    Args:
      folder: where the shards lie.
      entries: shard's file name, without its folder -> its entry (see `entry_of`). Shards that
        are not among them are read to be counted, as without a manifest.
      name: of the file.

    Raises:
      UserError: another program's file has that name, or it cannot be written.
    """
    lines = [f"{json.dumps(shard)}: {json.dumps(_row(e))}" for shard, e in entries.items()]
    head = f'{{"format": {json.dumps(_FORMAT)}, "shards": {{\n'
    text = head + ",\n".join(lines) + "}}\n"
    path = _path_in(folder, name)
    older = _read_json(path)
    if older is not None and not _is_manifest(older):
        raise UserError(f"{path} is another program's file: move it away to write a manifest there")
    if not is_url(path):
        with atomic_write(Path(path)) as partial:
            partial.write_text(text, encoding="utf-8")
        return
    try:
        fs, inner = file_system(path)
        fs.pipe_file(inner, text.encode())
    except Exception as e:  # every file system of fsspec has exceptions of its own
        raise UserError(f"{path} cannot be written ({short(e)}); give a folder that can") from e


def _row(entry: ShardEntry) -> list[Any]:
    """Return an entry without what is empty at its end."""
    row = list(entry)
    while row[-1] in (None, {}) and len(row) > 2:
        row.pop()
    return row


def read_manifest(folder: str | Path, *, name: str = MANIFEST_FILENAME) -> dict[str, ShardEntry]:
    """Return what `index.json`, or else `sizes.json` says: shard's file name -> entry.

    Without either there are no entries.

    Raises:
      UserError: `index.json` is damaged.
    """
    path = _path_in(folder, name)
    manifest = _read_json(path)
    if _is_manifest(manifest):
        try:
            return _parse_entries(manifest.get("shards"))
        except ValueError as e:
            raise _damaged(path, e) from e
    sizes = _read_json(_path_in(folder, SIZES_FILENAME)) if name == MANIFEST_FILENAME else None
    if not isinstance(sizes, dict):
        return {}
    # open_clip takes a count that is written as a string, too.
    counts = {shard: str(count) for shard, count in sizes.items()}
    if not all(count.isascii() and count.isdigit() for count in counts.values()):
        return {}
    return {shard: ShardEntry(int(count)) for shard, count in counts.items()}


def _parse_entries(rows: Any) -> dict[str, ShardEntry]:
    """Raise ValueError for what is not {shard: [pairs, bytes, what samples lack]}."""
    if not isinstance(rows, dict):
        raise ValueError("it has no table of shards")
    return {shard: _parse_entry(row) for shard, row in rows.items()}


def _parse_entry(row: Any) -> ShardEntry:
    match row:
        case [int(pairs)] if pairs >= 0:
            return ShardEntry(pairs)
        case [int(pairs), (int() | None) as size] if pairs >= 0:
            return ShardEntry(pairs, size)
        case [int(pairs), (int() | None) as size, dict(lacks)] if pairs >= 0:
            return ShardEntry(pairs, size, {cause: _parse_lack(v) for cause, v in lacks.items()})
        case [int(pairs), (int() | None) as size, dict(lacks), (str() | None) as digest]:
            rest = _parse_entry([pairs, size, lacks])
            return rest._replace(digest=digest)
    raise ValueError(f"{row!r}")


def _parse_lack(value: Any) -> tuple[int, str]:
    match value:
        case [int(count), str(first)]:
            return count, first
    raise ValueError(f"{value!r}")


def _path_in(folder: str | Path, name: str) -> str:
    return f"{folder}".rstrip("/") + "/" + name if str(folder) else name


def _is_manifest(content: Any) -> bool:
    return isinstance(content, dict) and content.get("format") == _FORMAT


def _read_json(path: str) -> Any:
    """Return the parsed file; None where there is none."""
    if not is_url(path) and not os.path.exists(path):
        return None
    try:
        return json.loads(read_whole(path, _MAX_BYTES))
    except OSError:
        return None  # shards are then counted by reading them
    except (ValueError, RecursionError) as e:
        if path.endswith("/" + SIZES_FILENAME):
            return None
        raise _damaged(path, e) from e


def _damaged(path: str, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({short(error)[:100]}): delete it or write it anew")


class ManifestReader:
    """Looks up shards by their paths: in the run's own manifest, then in the one beside a shard."""

    def __init__(self, workdir: str = ""):
        self._run = read_manifest(workdir, name=RUN_MANIFEST_FILENAME) if workdir else {}
        self._folders: dict[str, dict[str, ShardEntry]] = {}

    def get(self, path: str) -> ShardEntry | None:
        """Return the entry, if there is one; the first of a folder reads that folder's manifest.

        Raises:
          UserError: a manifest is damaged.
        """
        entry = self._run.get(path)
        if entry is None:
            folder, _, name = path.rpartition("/")
            if folder not in self._folders:
                self._folders[folder] = read_manifest(folder or ".")
            entry = self._folders[folder].get(name)
        return entry


@dataclass(frozen=True)
class UnreadableShard:
    """The reason why a shard cannot be read, and when that was seen by `time.monotonic`."""

    cause: str
    detail: str
    since: float


@dataclass(frozen=True)
class ProcessShare:
    """This process among those that count, and what gathers a JSON value from all of them."""

    index: int = 0
    count: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]


ONE_PROCESS = ProcessShare()


@dataclass(frozen=True)
class ShardCounts:
    """Every shard's entry, in the shards' order, or None with the reason in `unreadable`."""

    entries: list[ShardEntry | None]
    unreadable: dict[str, tuple[str, str]]  # shard -> (cause, detail)


def count_shards(
    shards: Sequence[str],
    read: Callable[[str], Shard | UnreadableShard],
    manifests: ManifestReader,
    *,
    workdir: str = "",
    share: ProcessShare = ONE_PROCESS,
) -> ShardCounts:
    """Return the entries of these shards, the same in all processes; each must call it.

    Args:
      shards: as `sources.expand` names them.
      read: reads a whole shard, which is done only where no manifest names it; see
        `dataset.ShardCache`.
      manifests: what is known.
      workdir: where process 0 writes what was counted.
      share: of the reading.

    Raises:
      UserError: a manifest is damaged.
    """
    paths = [split_options(shard)[0] for shard in shards]
    listed = {path: entry for path in paths if (entry := manifests.get(path)) is not None}
    changes: dict[int, list[Any]] = {}
    for known in (listed, {}):
        mine = range(share.index, len(paths), share.count)
        counted = _count_part(mine, shards, paths, known, read)
        gathered = share.gather([_digest(known, paths), list(counted.items())])
        changes = {int(i): row for _, rows in gathered for i, row in rows}
        # Where processes have other manifests (copies of the data), nobody uses any.
        if len({digest for digest, _ in gathered}) == 1:
            break
    unreadable: dict[str, tuple[str, str]] = {}
    for i, row in changes.items():
        known.pop(paths[i], None)
        if isinstance(row[0], str):
            unreadable[shards[i]] = row[0], row[1]
        else:
            known[paths[i]] = _parse_entry(row)
    if workdir and len(changes) > len(unreadable) and share.index == 0:
        entries = {path: known[path] for path in dict.fromkeys(paths) if path in known}
        before = read_manifest(workdir, name=RUN_MANIFEST_FILENAME)
        write_manifest(workdir, before | entries, name=RUN_MANIFEST_FILENAME)
    return ShardCounts([known.get(path) for path in paths], unreadable)


def _count_part(
    mine: Sequence[int],
    shards: Sequence[str],
    paths: Sequence[str],
    known: Mapping[str, ShardEntry],
    read: Callable[[str], Shard | UnreadableShard],
) -> dict[int, list[Any]]:
    """Count what of this part is not as the manifests say.

    Returns place -> [pairs, bytes, lacks], or [cause, detail] of a shard that cannot be read.
    """

    def count(i: int) -> list[Any] | None:
        entry = known.get(paths[i])
        if entry is not None:
            size = _size_now(paths[i], entry)
            if size == entry.size:
                return None
            if entry.size is None:
                return [entry.pairs, size, {}]
        shard = read(shards[i])
        if not isinstance(shard, UnreadableShard):
            return list(entry_of(shard))
        # A shard that a manifest names keeps its places, as rows that do not count.
        return [shard.cause, shard.detail] if entry is None else None

    # A thread takes a run of shards: most of them are known, and looked at in microseconds.
    runs = [mine[k : k + _SHARDS_PER_TASK] for k in range(0, len(mine), _SHARDS_PER_TASK)]
    with ThreadPoolExecutor(OPEN_THREADS, thread_name_prefix="count") as pool:
        try:
            counted = list(pool.map(lambda run: [(i, count(i)) for i in run], runs))
        finally:
            # After Ctrl-C, do not read the other shards first.
            pool.shutdown(wait=True, cancel_futures=True)
    return {i: row for run in counted for i, row in run if row is not None}


def _size_now(path: str, entry: ShardEntry) -> int | None:
    """Return the file's bytes; those of the entry where it is remote, or cannot be looked at."""
    if entry.size == 0:
        return 0  # nobody can say
    if is_url(path):
        # A manifest is there to spare a request a shard.
        return remote_size(path) if entry.size is None else entry.size
    try:
        return os.stat(path).st_size
    except OSError:
        return 0 if entry.size is None else entry.size  # a missing shard keeps its places


def _digest(known: Mapping[str, ShardEntry], paths: Sequence[str]) -> str:
    entries = [known.get(path) or ShardEntry(-1) for path in paths]
    numbers = np.array([(e.pairs, -1 if e.size is None else e.size) for e in entries], np.int64)
    return hashlib.blake2b(numbers.tobytes(), digest_size=16).hexdigest()
