"""How long a run takes to its first batch, and what it holds in memory: many shards, far positions.

    python -m benchmarks.resume --shards 1000 --pairs 100
    python -m benchmarks.resume --web

The first makes real shards and opens them as a run does: for the first time, and again from the
run's own manifest at several positions, each in a process of its own. `--web` is a simulation of
one of 1,024 hosts on 5 billion pairs in 500,000 shards: index.json is really written and read, only
the shards are not there.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from clip_jax.data.dataset import TrainingData, open_sources
from clip_jax.data.loader import make_train_loader
from clip_jax.data.manifest import ProcessShare, ShardEntry, write_manifest
from clip_jax.data.order import BatchOrder, BatchPart, Order
from clip_jax.data.sample_reader import SampleShape
from clip_jax.data.skip_log import SkipLog
from clip_jax.data.sources import fingerprint
from clip_jax.sections import DataSection
from clip_jax.tokenizers import make_tokenizer, tokenizer_spec

WEB_SHARDS, WEB_PAIRS, HOSTS, STREAMS, BATCH = 500_000, 10_000, 1024, 1024, 131_072
WINDOW = DataSection.window


class Clock:
    """Measures wall and CPU seconds since it was made, and the process's memory."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def report(self, what: str, **more: object) -> None:
        """Print one line and begin anew."""
        line = {
            "what": what,
            "wall s": round(time.perf_counter() - self._wall, 3),
            "cpu s": round(time.process_time() - self._cpu, 3),
            "MiB now": round(resident_bytes() / 2**20),
            "MiB peak": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }
        print(json.dumps(line | more), flush=True)
        self._start()


def resident_bytes() -> int:
    """Return the bytes of this process that are in RAM now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def write_shards(folder: Path, shards: int, pairs: int) -> None:
    """Write shards of one small image each with its own key and caption."""
    out = io.BytesIO()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(out, "JPEG")
    folder.mkdir(parents=True, exist_ok=True)
    for s in range(shards):
        with tarfile.open(folder / f"{s:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for k in range(pairs):
                for suffix, body in (("jpg", out.getvalue()), ("txt", f"pair {k}".encode())):
                    member = tarfile.TarInfo(f"{s:05d}{k:04d}.{suffix}")
                    member.size = len(body)
                    tar.addfile(member, io.BytesIO(body))


def first_batch(folder: str, run: str, step: int) -> None:
    """Do what a run does up to its first batch, and fetch that batch."""
    tokenizer = make_tokenizer(tokenizer_spec("clip"))
    clock = Clock()
    log = SkipLog()
    data = TrainingData(
        open_sources(f"{folder}/*.tar", log=log, cached_shards=128, workdir=run), log
    )
    fingerprint(data.shards)
    config = DataSection(threads=2)
    shape = SampleShape(image_size=32, context_length=77)
    with make_train_loader(
        data, config, tokenizer, shape=shape, batch_size=256, seed=0, start_step=step
    ) as loader:
        batch = next(loader)
        assert batch["valid"].all()
        clock.report(f"first batch at step {step:,}, {len(data.shards):,} shards")


def web() -> None:
    """Measure one host of 1,024 from index.json to its rows at a far step."""
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        entries = {
            f"{s:06d}.tar": ShardEntry(WEB_PAIRS, 524_288_000 + s) for s in range(WEB_SHARDS)
        }
        write_manifest(folder, entries)
        size = os.path.getsize(f"{folder}/index.json")
        clock.report("the index is written", MiB=round(size / 2**20, 1))
        line = [sys.executable, "-m", "benchmarks.resume", "--host", folder]
        subprocess.run(line, check=True)


def host(folder: str) -> None:
    """Measure as `web` does, in a process that did not write index.json."""
    clock = Clock()
    clock.report("imported")
    pattern = f"{folder}/{{000000..{WEB_SHARDS - 1:06d}}}.tar"
    share = ProcessShare(17, HOSTS)  # whose others find what it says
    (shards,) = open_sources(pattern, log=SkipLog(), cached_shards=128, share=share)
    pairs = sum(map(len, shards))
    clock.report("the index is read and every shard known", pairs=f"{pairs:,}")
    fingerprint(shards)
    clock.report("the data's fingerprint")
    order = Order([len(shard) for shard in shards], seed=0, num_streams=STREAMS, window=WINDOW)
    mine = BatchOrder(order, batch_size=BATCH, part=BatchPart(17, HOSTS))
    ids, _ = mine.rows_at(1_000_000, 0, mine.rows)
    clock.report("rows at step 1,000,000", rows=len(ids), shards=len(set(ids // WEB_PAIRS)))
    mine.rows_at(2_345_678, 0, mine.rows)
    clock.report("rows at another step")


def main() -> None:
    """Make each measurement in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--web", action="store_true")
    parser.add_argument("--host", default="", help=argparse.SUPPRESS)
    parser.add_argument("--open", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.host:
        host(args.host)
    elif args.web:
        web()
    elif args.open:
        first_batch(args.open[0], args.open[1], int(args.open[2]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_shards(Path(folder, "set"), args.shards, args.pairs)
            for step in (0, 1, 123_456, 1_000_000_007):
                line = [sys.executable, "-m", "benchmarks.resume", "--open", f"{folder}/set"]
                subprocess.run([*line, f"{folder}/run", str(step)], check=True)


if __name__ == "__main__":
    main()
