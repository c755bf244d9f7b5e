"""Write a set of tar shards side by side, and go on after a kill.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from clip_jax.data.formats.webdataset import SIDE_SUFFIX, open_shard, write_side_file
from clip_jax.data.images import image_suffix
from clip_jax.data.manifest import ShardEntry, entry_of, write_manifest
from clip_jax.data.shards import BadSampleError, ConcatShards, Handles, Shard, sample_cause
from clip_jax.data.sources import fingerprint
from clip_jax.data.writing.tar_writer import Sample, Shrink, read_sample, write_shard
from clip_jax.files import atomic_write, claim_folder

BUILD_INFO = "shards.json"
SKIPPED_SUFFIX = ".skipped.jsonl"
"""Of the file beside a shard that names the samples that were left out of it."""
PER_SHARD = 10_000
"""Samples of a shard, unless the caller says otherwise."""


@dataclass(frozen=True)
class ShardSet:
    """A set of shards to write.

    Attributes:
      shards: the shards of the source; rows count their samples, one shard after the other.
      rows: the samples, in the order in which they are written.
      folder: where they are written.
      per_shard: rows of a shard.
      shrink: what is done to images; None leaves all as they are.
      extra: fields that a row's JSON record gets, by its place in `rows`.
    """

    shards: Sequence[Shard]
    rows: Int64[np.ndarray, " rows"]
    folder: Path
    per_shard: int = PER_SHARD
    shrink: Shrink | None = None
    extra: Callable[[int], Mapping[str, Any]] = lambda place: {}

    def __len__(self) -> int:
        """Return how many shards are written."""
        return -(-len(self.rows) // self.per_shard)

    def path(self, k: int) -> Path:
        """Return the path of shard `k`."""
        return self.folder / f"{k:0{max(5, len(str(len(self) - 1)))}d}.tar"

    def places(self, k: int) -> range:
        """Return the part of `rows` that belongs to shard `k`."""
        return range(k * self.per_shard, min((k + 1) * self.per_shard, len(self.rows)))


@dataclass(frozen=True)
class WrittenShards:
    """A set that is on the disk.

    Attributes:
      pattern: its shards, as `config.data.train` takes them.
      shards: how many there are.
      samples: pairs in all of them.
      size: bytes of all of them.
      skipped: cause -> samples that were left out.
    """

    pattern: str
    shards: int
    samples: int
    size: int
    skipped: Counter[str]


def claim_shard_folder(
    shard_set: ShardSet, options: Mapping[str, Any], *, write: bool = True
) -> bool:
    """Write into the folder what the set is made of, unless it says just that already.

    Args:
      options: the user's choices, by flag; the source is known by its fingerprint.
      write: False leaves a new folder as it is.

    Returns:
      Whether the folder said so already.

    Raises:
      UserError: the folder holds something else; the first difference is named.
    """
    digest = hashlib.blake2b(shard_set.rows.astype("<i8").tobytes(), digest_size=16).hexdigest()
    build_info = {
        **options,
        "the source's fingerprint": fingerprint(shard_set.shards),
        "samples": len(shard_set.rows),
        "their places": digest,
    }
    return claim_folder(shard_set.folder, build_info, name=BUILD_INFO, write=write)


WriteMissing = Callable[[Sequence[int]], Mapping[int, Mapping[str, Any]]]
"""Writes the shards of these numbers; returns the side file of each."""


def write_set(
    shard_set: ShardSet,
    *,
    threads: int,
    on_rows: Callable[[int], object] = lambda rows: None,
    write_missing: WriteMissing | None = None,
) -> WrittenShards:
    """Write the shards that are not there yet; an interruption leaves whole ones only.

    Args:
      threads: shards written at a time.
      on_rows: called with how many more rows are done, from several threads.
      write_missing: writes them, by `write_one`, where threads of this process do not.

    Raises:
      UserError: the disk is full, or a file cannot be written.
    """
    records = {k: _read_side_file(shard_set.path(k)) for k in range(len(shard_set))}
    for k, record in records.items():
        if record is not None:
            on_rows(len(shard_set.places(k)))
    missing = [k for k, record in records.items() if record is None]
    if write_missing is None:
        written: Mapping[int, Mapping[str, Any]] = _write_by_threads(
            shard_set, missing, threads, on_rows
        )
    else:
        written = write_missing(missing)
    return _summary(shard_set, [record or written[k] for k, record in records.items()])


def _write_by_threads(
    shard_set: ShardSet, missing: Sequence[int], threads: int, on_rows: Callable[[int], object]
) -> dict[int, dict[str, Any]]:
    """Write shards side by side; return the side file of each."""
    stop = threading.Event()
    with ThreadPoolExecutor(threads, thread_name_prefix="shard") as pool:
        futures = {k: pool.submit(_write_one, shard_set, k, stop, on_rows) for k in missing}
        try:
            wait(futures.values(), return_when=FIRST_EXCEPTION)
            return {k: future.result() for k, future in futures.items()}
        finally:
            stop.set()  # after an error or Ctrl-C, no thread finishes its shard first
            pool.shutdown(wait=True, cancel_futures=True)


def write_one(shard_set: ShardSet, k: int) -> dict[str, Any]:
    """Write one shard with the files beside it; return its side file.

    Raises:
      UserError: the disk is full, or a file cannot be written.
    """
    return _write_one(shard_set, k, threading.Event(), lambda rows: None)


def _read_side_file(path: Path) -> dict[str, Any] | None:
    """Return the side file of a shard that is whole, or None."""
    try:
        record = json.loads(Path(f"{path}{SIDE_SUFFIX}").read_text(encoding="utf-8"))
        size = path.stat().st_size
    except (OSError, ValueError):
        return None
    whole = isinstance(record, dict) and "samples" in record and record.get("bytes") == size
    return record if whole else None


def _summary(shard_set: ShardSet, records: Sequence[Mapping[str, Any]]) -> WrittenShards:
    """Write the folder's index, from which a run knows its order without reading a shard."""
    paths = [shard_set.path(k) for k in range(len(shard_set))]
    entries = [
        ShardEntry(r["samples"], r["bytes"], r.get("lacks", {}), r.get("members")) for r in records
    ]
    write_manifest(shard_set.folder, {path.name: e for path, e in zip(paths, entries, strict=True)})
    return WrittenShards(
        pattern=f"{shard_set.folder}/{{{paths[0].stem}..{paths[-1].stem}}}.tar",
        shards=len(paths),
        samples=sum(record["samples"] for record in records),
        size=sum(record["bytes"] for record in records),
        skipped=sum((Counter(record.get("skipped", {})) for record in records), Counter[str]()),
    )


class _Stopped(Exception):
    """Another thread failed, or the user interrupted."""


def _write_one(
    shard_set: ShardSet, k: int, stop: threading.Event, on_rows: Callable[[int], object]
) -> dict[str, Any]:
    """Write shard `k` with the files beside it; return its side file."""
    path = shard_set.path(k)
    skipped: list[tuple[str, str, str]] = []
    write_shard(path, _usable(shard_set, k, skipped, stop, on_rows))
    if skipped:
        lines = [json.dumps({"cause": c, "name": name, "detail": d}) for c, name, d in skipped]
        with atomic_write(path.with_suffix(SKIPPED_SUFFIX)) as partial:
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    shard = open_shard(str(path))
    causes = Counter(cause for cause, _, _ in skipped)
    extra = {"lacks": entry_of(shard).lacks, "skipped": dict(sorted(causes.items()))}
    return write_side_file(shard, {name: value for name, value in extra.items() if value})


def _usable(
    shard_set: ShardSet,
    k: int,
    skipped: list[tuple[str, str, str]],
    stop: threading.Event,
    on_rows: Callable[[int], object],
) -> Iterator[Sample]:
    """Yield the samples of shard `k`; those that cannot be used go to `skipped`."""
    samples = ConcatShards(shard_set.shards)
    with Handles() as handles:
        for place in shard_set.places(k):
            if stop.is_set():
                raise _Stopped
            shard, i = samples.at(int(shard_set.rows[place]))
            try:
                sample = _prepared(read_sample(shard, i, handles), shard_set, place)
            except (BadSampleError, OSError) as e:
                skipped.append((sample_cause(e), f"{shard.name}/{shard.key(i)}", str(e)[:500]))
            else:
                yield sample
            on_rows(1)


def _prepared(sample: Sample, shard_set: ShardSet, place: int) -> Sample:
    image = sample.image if shard_set.shrink is None else shard_set.shrink(sample.image)
    image_suffix(image)  # raises for what is no image
    record = {**sample.record, **shard_set.extra(place)}
    return Sample(sample.key, image, sample.captions, record, sample.label)
