"""Write any source as tar shards: `python -m clip_jax.data.shard SOURCE --out DIR`.

SOURCE is what `config.data.train` takes. Images keep their bytes (unless `--resize`), captions
become `.txt`, fields `.json` and class numbers `.cls`. The same command goes on after a kill, and
`--executor ray` writes the shards on a cluster.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.data.dataset import open_all_shards
from clip_jax.data.skip_log import SkipLog
from clip_jax.data.writing.shard_set import (
    PER_SHARD,
    SKIPPED_SUFFIX,
    ShardSet,
    WrittenShards,
    claim_shard_folder,
    write_one,
    write_set,
)
from clip_jax.data.writing.tar_writer import JPEG_QUALITY, Shrink
from clip_jax.errors import UserError, check_counts, run_command
from clip_jax.executors.parts import Executor, PartMaker
from clip_jax.executors.pool import WorkerPool
from clip_jax.files import check_local
from clip_jax.progress_bar import progress_bar
from clip_jax.sections import DataSection
from clip_jax.tools.absolute_paths import absolute_source
from clip_jax.tools.executor_flags import add_executor_flags, executor_of, pop_executor_flags

_DATA = DataSection()


@dataclass(frozen=True)
class ShardResult:
    """The shards that were written, and those that could not be read.

    Attributes:
      written: the set on the disk.
      lost_shards: (cause, name, detail) of each shard of the source that cannot be read.
    """

    written: WrittenShards
    lost_shards: tuple[tuple[str, str, str], ...]


def shard(
    source: Sequence[str],
    out: str | Path,
    *,
    per_shard: int = PER_SHARD,
    resize: int | None = None,
    quality: int = JPEG_QUALITY,
    where: str = _DATA.filter,
    unique_keys: bool = _DATA.unique_keys,
    threads: int = _DATA.threads,
    executor: Executor | None = None,
) -> ShardResult:
    """Write a source as shards.

    Args:
      source: as `config.data.train` takes them.
      out: the folder to write.
      per_shard: samples of a shard.
      resize: longest short side of an image in pixels; None leaves all images as they are.
      quality: of JPEGs that are resized.
      where: as `config.data.filter`.
      unique_keys: take the first sample of every key alone.
      threads: shards written at a time.
      executor: whose workers write them; None is threads of this process.

    Raises:
      UserError: the source holds nothing, a number is out of range, or `out` something else.
    """
    check_counts({"--per-shard": per_shard, "--threads": threads, "--resize": resize})
    if not 1 <= quality <= 100:
        raise UserError(f"--quality is {quality}; it takes 1 to 100")
    log, folder = SkipLog(), Path(out)
    settings: dict[str, Any] = {
        "per_shard": per_shard,
        "resize": resize,
        "quality": quality,
        "where": where,
        "unique_keys": unique_keys,
    }
    shard_set, options = _open_set(source, folder, log=log, **settings)
    claim_shard_folder(shard_set, options)
    if executor is None:
        with progress_bar(len(shard_set.rows), folder.name) as progress:
            written = write_set(shard_set, threads=threads, on_rows=progress.update)
    else:
        settings |= {
            "source": [absolute_source(one) for one in source],
            "folder": str(folder.absolute()),
        }
        with WorkerPool(
            executor, "clip_jax.tools.data_shard:open_writer", settings, uses_devices=False
        ) as pool:
            written = write_set_on(pool, shard_set, title=folder.name)
    return ShardResult(written, tuple(log.excluded_shards))


def _open_set(
    source: Sequence[str],
    folder: Path,
    *,
    log: SkipLog,
    per_shard: int,
    resize: int | None,
    quality: int,
    where: str,
    unique_keys: bool,
) -> tuple[ShardSet, dict[str, Any]]:
    """Open a source; return the set to write, and the choices that its folder remembers."""
    shards = open_all_shards(source, where=where, unique_keys=unique_keys, log=log)
    rows = np.arange(sum(map(len, shards)))
    shrink = Shrink(resize, quality) if resize else None
    sizes = {"--per-shard": per_shard, "--resize": resize, "--quality": quality}
    options = {**sizes, "--filter": where, "--unique-keys": unique_keys}
    return ShardSet(shards, rows, folder, per_shard, shrink), options


def open_writer(source: Sequence[str], folder: str, **settings: Any) -> PartMaker:
    """Open what a worker writes shards from, by `shard`'s arguments."""
    shard_set, options = _open_set(source, Path(folder), log=SkipLog(), **settings)
    return writer_of(shard_set, options)


def writer_of(shard_set: ShardSet, options: Mapping[str, Any]) -> PartMaker:
    """Return what makes the shards of a set on a worker; their parts are their numbers."""

    return PartMaker(
        len(shard_set),
        make=lambda k: write_one(shard_set, k),
        folder=shard_set.folder,
        is_begun=lambda: claim_shard_folder(shard_set, options, write=False),
    )


def write_set_on(pool: WorkerPool, shard_set: ShardSet, *, title: str) -> WrittenShards:
    """Write the shards that are not there yet on the workers of a pool.

    Raises:
      UserError: a worker cannot write, or does not see the same files.
    """
    rows = {k: len(shard_set.places(k)) for k in range(len(shard_set))}
    written: dict[int, Mapping[str, Any]] = {}

    def write_missing(missing: Sequence[int]) -> Mapping[int, Mapping[str, Any]]:
        pool.run(rows, missing, title=title, on_part=written.__setitem__)
        return written

    return write_set(shard_set, threads=1, write_missing=write_missing)


def result_text(result: ShardResult) -> str:
    """Return what the command prints."""
    return written_text(result.written) + "".join(
        f"\nleft out: {detail if cause != 'shard_missing' else f'{name}, which is missing'}"
        for cause, name, detail in result.lost_shards
    )


def written_text(written: WrittenShards) -> str:
    """Return the lines on a set that is written."""
    text = (
        f"{written.samples:,} pairs in {written.shards} shards, {written.size / 2**20:,.1f} MiB:"
        f" {written.pattern}"
    )
    if written.skipped:
        causes = ", ".join(f"{n} {cause}" for cause, n in sorted(written.skipped.items()))
        folder = Path(written.pattern).parent
        text += f"\nleft out: {causes}; named in {folder}/*{SKIPPED_SUFFIX}"
    return text


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.data.shard", description=__doc__)
    add = parser.add_argument
    add("source", nargs="+", help="tar shards, a table, records, a folder, a URL")
    add("--out", required=True, help="the folder to write")
    add("--per-shard", type=int, default=PER_SHARD, help="samples of a shard")
    add("--resize", type=int, help="longest short side of an image, pixels")
    add("--quality", type=int, default=JPEG_QUALITY, help="of JPEGs that are resized")
    add("--filter", dest="where", default=_DATA.filter, help='as config.data.filter: "width>=200"')
    add("--unique-keys", action="store_true", help="take the first sample of every key alone")
    add("--threads", type=int, default=_DATA.threads, help="shards written at a time")
    add_executor_flags(parser)
    return parser.parse_args(argv)


def main() -> int:
    """Parse the flags, write the shards and print the result; return the exit code.

    Raises:
      UserError: not one sample could be written.
    """
    args = parse(None)
    check_local({"--out": args.out})
    with executor_of(pop_executor_flags(args)) as executor:
        result = shard(**vars(args), executor=executor)
    if not result.written.samples:
        text = " ".join(result_text(result).splitlines())
        raise UserError(f"no sample is written. {text}")
    print(result_text(result))
    return 0


if __name__ == "__main__":
    run_command(main)
