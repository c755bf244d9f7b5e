"""A set of tar shards, written side by side and gone on with after a kill.

Shard k holds the usable ones among `rows[k * per_shard : (k + 1) * per_shard]`, so its bytes
depend on nothing that was written before it. Its side file is written last and proves that the
shard is whole. The build info, written first, says what the set is made of; a folder with another
one is left alone.
"""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from clip_jax.data.formats.webdataset import INDEX_ENDING, open_shard, side_file
from clip_jax.data.images import ImageError
from clip_jax.data.manifest import Entry, entry_of, write_index
from clip_jax.data.shards import BadSampleError, ConcatShards, Handles, Shard
from clip_jax.data.sources import fingerprint
from clip_jax.data.writing.tar_writer import Sample, Shrink, image_suffix, read_sample, write_shard
from clip_jax.files import atomic_write, claim_folder

BUILD_INFO = "shards.json"
SKIPPED_ENDING = ".skipped.jsonl"
"""Of the file beside a shard that names what was left out of it."""


@dataclass
class Written:
    """What is in the shards, and what was left out: cause -> samples."""

    samples: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "Written") -> "Written":
        return Written(self.samples + other.samples, self.skipped + other.skipped)


@dataclass(frozen=True)
class ShardSet:
    """What to write, and where.

    Attributes:
      indexes: the shards of the source, whose samples the rows count in line.
      rows: the samples, in the order in which they are written.
      out: the folder.
      per_shard: rows of a shard.
      shrink: what is done to images; None leaves all as they are.
      extra: fields that a row's json gets, by its place in `rows`.
    """

    indexes: Sequence[Shard]
    rows: Int64[np.ndarray, " rows"]
    out: Path
    per_shard: int = 10_000
    shrink: Shrink | None = None
    extra: Callable[[int], Mapping[str, Any]] = lambda place: {}

    def __len__(self) -> int:
        return -(-len(self.rows) // self.per_shard)

    def path(self, k: int) -> Path:
        """Of shard k."""
        return self.out / f"{k:0{max(5, len(str(len(self) - 1)))}d}.tar"

    def places(self, k: int) -> range:
        """The part of `rows` that belongs to shard k."""
        return range(k * self.per_shard, min((k + 1) * self.per_shard, len(self.rows)))


def claim_shard_folder(shards: ShardSet, options: Mapping[str, Any]) -> None:
    """Write into the folder what the set is made of, unless it says just that already.

    Args:
      options: the user's choices, by flag; the source is known by its fingerprint.

    Raises:
      UserError: the folder holds something else; the first difference is named.
    """
    digest = hashlib.blake2b(shards.rows.astype("<i8").tobytes(), digest_size=16).hexdigest()
    build_info = {
        **options,
        "the source's fingerprint": fingerprint(shards.indexes),
        "samples": len(shards.rows),
        "their places": digest,
    }
    claim_folder(shards.out, build_info, name=BUILD_INFO)


def done_shard(shards: ShardSet, k: int) -> Written | None:
    """What shard k holds if it is written, or None."""
    path = shards.path(k)
    try:
        record = json.loads(Path(f"{path}{INDEX_ENDING}").read_text(encoding="utf-8"))
        size = path.stat().st_size
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or "samples" not in record or record.get("bytes") != size:
        return None
    return Written(record["samples"], Counter(record.get("skipped", {})))


def write_set(
    shards: ShardSet,
    *,
    threads: int = 4,
    progress: Callable[[int], object] = lambda samples: None,
) -> Written:
    """Write the shards that are not there yet; an interruption leaves whole ones only.

    Args:
      threads: shards written at a time.
      progress: told how many more rows were dealt with; called from several threads.

    Raises:
      UserError: the disk is full, or a file cannot be written.
    """
    total = Written()
    missing = []
    for k in range(len(shards)):
        done = done_shard(shards, k)
        if done is None:
            missing.append(k)
        else:
            total += done
            progress(len(shards.places(k)))
    stop = threading.Event()
    with ThreadPoolExecutor(threads, thread_name_prefix="shard") as pool:
        futures = [pool.submit(_write_one, shards, k, stop, progress) for k in missing]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            total = sum((future.result() for future in futures), total)
        finally:
            stop.set()  # after an error or Ctrl-C, no thread finishes its shard first
            pool.shutdown(wait=True, cancel_futures=True)
    _write_counts(shards)
    return total


def _write_counts(shards: ShardSet) -> None:
    """The index of the whole folder, from which a run knows its order without reading shards."""
    paths = [shards.path(k) for k in range(len(shards))]
    counts = [json.loads(Path(f"{path}{INDEX_ENDING}").read_text("utf-8")) for path in paths]
    entries = [Entry(c["samples"], c["bytes"], c.get("lacks", {})) for c in counts]
    write_index(shards.out, {path.name: e for path, e in zip(paths, entries, strict=True)})


class _Stopped(Exception):
    """Another thread failed, or the user interrupted."""


def _write_one(
    shards: ShardSet, k: int, stop: threading.Event, progress: Callable[[int], object]
) -> Written:
    path = shards.path(k)
    skipped: list[tuple[str, str, str]] = []
    write_shard(path, _usable(shards, k, skipped, stop, progress))
    if skipped:
        lines = [json.dumps({"cause": c, "name": name, "detail": d}) for c, name, d in skipped]
        with atomic_write(path.with_suffix(SKIPPED_ENDING)) as partial:
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    index = open_shard(str(path))
    written = Written(len(index), Counter(cause for cause, _, _ in skipped))
    record = json.loads(side_file(index))
    if lacks := entry_of(index).lacks:
        record["lacks"] = lacks
    if written.skipped:
        record["skipped"] = dict(sorted(written.skipped.items()))
    with atomic_write(Path(f"{path}{INDEX_ENDING}")) as partial:
        partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return written


def _usable(
    shards: ShardSet,
    k: int,
    skipped: list[tuple[str, str, str]],
    stop: threading.Event,
    progress: Callable[[int], object],
) -> Iterator[Sample]:
    line = ConcatShards(shards.indexes)
    with Handles() as handles:
        for place in shards.places(k):
            if stop.is_set():
                raise _Stopped
            index, i = line.at(int(shards.rows[place]))
            try:
                sample = _prepared(read_sample(index, i, handles), shards, place)
            except (BadSampleError, ImageError, OSError) as e:
                cause = getattr(e, "cause", "read_failed")
                skipped.append((cause, f"{index.name}/{index.key(i)}", str(e)[:500]))
            else:
                yield sample
            progress(1)


def _prepared(sample: Sample, shards: ShardSet, place: int) -> Sample:
    image = sample.image if shards.shrink is None else shards.shrink(sample.image)
    image_suffix(image)  # raises for what is no image
    record = {**sample.record, **shards.extra(place)}
    return Sample(sample.key, image, sample.captions, record, sample.label)
