"""How many pairs each shard of a folder holds, in one small file beside the shards.

With such a file a run knows its order without reading a single shard first: `index.json`, which
`write_index` writes, or `sizes.json`, the file of webdataset and open_clip with nothing but
{shard name: count}. `index.json` holds a line a shard,

    {"format": "clip_jax shards 1", "shards": {
    "00000.tar": [10000, 524288000],
    "00001.tar": [9998, 523999744, {"no_caption": [2, "000010017"]}]}}

its pairs, its bytes and, where its headers show it, what samples lack: how many, and the first.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from clip_jax.data.formats.remote import file_system, is_url, read_whole
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
