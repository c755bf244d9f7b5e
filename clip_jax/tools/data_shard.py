"""Write any source as tar shards: `python -m clip_jax.data.shard SOURCE --out DIR`.

SOURCE is what `config.data.train` takes. Images keep their bytes (unless `--resize`), captions
become `.txt`, fields `.json` and class numbers `.cls`. The same command goes on after a kill.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clip_jax.data.dataset import open_line
from clip_jax.data.skip_log import SkipLog
from clip_jax.data.writing.shard_set import ShardSet, Written, claim_shard_folder, write_set
from clip_jax.data.writing.tar_writer import Shrink
from clip_jax.errors import UserError, run_command
from clip_jax.progress_bar import progress_bar


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.data.shard", description=__doc__)
    parser.add_argument("source", nargs="+", help="tar shards, a table, records, a folder, a URL")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--per-shard", type=int, default=10_000, help="samples of a shard")
    parser.add_argument("--resize", type=int, help="longest short side of an image, pixels")
    parser.add_argument("--quality", type=int, default=95, help="of JPEGs that are resized")
    parser.add_argument("--filter", default="", help='as config.data.filter: "width>=200"')
    parser.add_argument("--unique-keys", action="store_true", help="the first sample of a key")
    parser.add_argument("--threads", type=int, default=4, help="shards written at a time")
    return parser.parse_args(argv)


def shard(
    source: Sequence[str],
    out: str,
    *,
    per_shard: int = 10_000,
    resize: int | None = None,
    quality: int = 95,
    where: str = "",
    unique_keys: bool = False,
    threads: int = 4,
) -> str:
    """Write a source as shards; returns what to tell the user.

    Raises:
      UserError: the source holds nothing, a number is out of range, or `out` something else.
    """
    for flag, value, most in (
        ("--per-shard", per_shard, None),
        ("--threads", threads, None),
        ("--resize", 1 if resize is None else resize, None),
        ("--quality", quality, 100),
    ):
        if value < 1 or (most is not None and value > most):
            raise UserError(f"{flag} is {value}; it takes {f'1 to {most}' if most else 'above 0'}")
    log = SkipLog()
    indexes = open_line(source, where=where, unique_keys=unique_keys, log=log)
    rows = np.arange(sum(map(len, indexes)))
    shrink = Shrink(resize, quality) if resize else None
    shards = ShardSet(indexes, rows, Path(out), per_shard, shrink)
    about = {"--per-shard": per_shard, "--resize": resize, "--quality": quality}
    claim_shard_folder(shards, {**about, "--filter": where, "--unique-keys": unique_keys})
    with progress_bar(len(rows), os.path.basename(os.path.normpath(out))) as progress:
        written = write_set(shards, threads=threads, progress=progress.update)
    return told(shards, written) + "".join(
        f"\nleft out: {detail if cause != 'shard_missing' else f'{name}, which is missing'}"
        for cause, name, detail in log.lost
    )


def told(shards: ShardSet, written: Written) -> str:
    """The line that a finished set ends with."""
    count = len(shards)
    names = f"{{{shards.path(0).stem}..{shards.path(count - 1).stem}}}.tar"
    size = sum(shards.path(k).stat().st_size for k in range(count)) / 2**20
    left_out = ", ".join(f"{n} {cause}" for cause, n in sorted(written.skipped.items()))
    return f"{written.samples:,} pairs in {count} shards, {size:,.1f} MiB: {shards.out}/{names}" + (
        f"\nleft out: {left_out}; named in {shards.out}/*.skipped.jsonl" if left_out else ""
    )


def main() -> int:
    """Parse and write; the exit code."""
    args = parse(None)
    print(
        shard(
            args.source,
            args.out,
            per_shard=args.per_shard,
            resize=args.resize,
            quality=args.quality,
            where=args.filter,
            unique_keys=args.unique_keys,
            threads=args.threads,
        )
    )
    return 0


if __name__ == "__main__":
    run_command(main)
