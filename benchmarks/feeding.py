"""Pairs a second that one host's loader hands out if decoding costs no processor:
`python -m benchmarks.feeding --threads 64 --processes 0,8`.

Decoding and cropping are replaced by a sleep of 2 ms, which gives Python's lock away as they do and
leaves the cores free. What is left is our own work for a pair: its place in the order, the draws,
reading its bytes, its tokens, its row in the batch. So the rate is where a host with any number of
cores ends, as far as the cores at hand can do that work: besides the rate, the processors' time for
a pair is told, in this process and in those that decode. `--real` decodes; `--floor` does without a
loader: its processes' threads sleep, read an image's bytes and write a crop's, and that is all.
"""

import io
import multiprocessing
import os
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from benchmarks import interleaved
from clip_jax.data.dataset import TrainingData, open_sources
from clip_jax.data.images import Chance
from clip_jax.data.loader import CHUNK_ROWS, make_train_loader
from clip_jax.data.sample_reader import DECODING, Decode, Decoding, ImageTransform, SampleShape
from clip_jax.data.skip_log import SkipLog
from clip_jax.sections import DataSection
from clip_jax.tokenizers import make_tokenizer

WORDS = ("photo", "old", "red", "temple", "quiet", "lake", "flowers", "under", "blue", "sky")
SLEEP = 0.002
"""Seconds that stand for decoding and cropping one image."""
SIDE = 224
IMAGE_BYTES = 60_000
DRAWS = 6
"""Numbers that a training crop draws."""


def write_set(folder: Path, pairs: int, shards: int) -> None:
    """Write shards of JPEGs of 300 to 600 pixels a side, about 60 kB each."""
    rng = np.random.default_rng(0)
    for s in range(shards):
        with webdataset.TarWriter(str(folder / f"{s:05d}.tar")) as writer:
            for k in range(s * pairs // shards, (s + 1) * pairs // shards):
                side = tuple(int(v) for v in rng.integers(300, 601, 2))
                pixels = rng.integers(0, 256, (48, 48, 3), np.uint8)
                image = Image.fromarray(pixels).resize(side, Image.Resampling.BICUBIC)
                out = io.BytesIO()
                image.save(out, "JPEG", quality=92)
                caption = " ".join(rng.choice(WORDS, int(rng.integers(5, 20)))) + f" {k}"
                writer.write({"__key__": f"{k:09d}", "jpg": out.getvalue(), "txt": caption})


def make_sleep(image_size: int, config: DataSection) -> Decode:
    """Make what stands for a decoder."""
    image = Image.new("RGB", (image_size, image_size))

    def decode(data: bytes) -> Image.Image:
        time.sleep(SLEEP)
        return image

    return decode


def make_no_crop(image_size: int, config: DataSection) -> ImageTransform:
    """Make what stands for a crop: the same pixels every time, and as many draws."""
    pixels = np.full((image_size, image_size, 3), 7, np.uint8)

    def transform(image: Image.Image, rng: Chance) -> np.ndarray:
        for _ in range(DRAWS):
            rng.random()
        return pixels

    return transform


SLEEPING = Decoding(make_sleep, make_no_crop)


def measure(
    folder: str, *, threads: int, processes: int, decoding: Decoding, batch: int, seconds: float
) -> dict[str, float]:
    """Return pairs a second, and the microseconds of processors for a pair: all, and here."""
    log = SkipLog()
    data = TrainingData(open_sources(folder, log=log, cached_shards=128, workdir=folder), log)
    config = DataSection(threads=threads, processes=processes)
    with make_train_loader(
        data,
        config,
        make_tokenizer("clip"),
        shape=SampleShape(SIDE, 77),
        batch_size=batch,
        seed=0,
        decoding=decoding,
    ) as loader:
        ahead = 2 + 2 * threads * CHUNK_ROWS // batch
        for _ in range(ahead):  # until no batch was read ahead at the start
            next(loader)
        start, cpu, here, pairs = time.perf_counter(), loader.cpu_seconds(), time.process_time(), 0
        while (elapsed := time.perf_counter() - start) < seconds:
            pairs += len(next(loader)["valid"])
        used = loader.cpu_seconds() - cpu, time.process_time() - here
    return {
        "pairs/s": pairs / elapsed,
        "CPU us a pair": 1e6 * used[0] / pairs,
        "of it here": 1e6 * used[1] / pairs,
    }


def _bare_loop(path: str, threads: int, seconds: float, counted: Any) -> None:
    """Sleep, read 60 kB and write a crop in each of these threads; tell pairs and CPU seconds."""
    fd, size = os.open(path, os.O_RDONLY), os.path.getsize(path)
    crop = np.full((SIDE, SIDE, 3), 7, np.uint8)
    batch = np.zeros((1024, *crop.shape), np.uint8)
    pairs = [0] * threads
    end = time.perf_counter() + seconds

    def run(thread: int) -> None:
        rng = random.Random(thread)
        while time.perf_counter() < end:
            os.pread(fd, IMAGE_BYTES, rng.randrange(size - IMAGE_BYTES))
            time.sleep(SLEEP)
            batch[(thread + pairs[thread] * threads) % len(batch)] = crop
            pairs[thread] += 1

    start = time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, range(threads)))
    counted.put((sum(pairs), time.process_time() - start))


def measure_floor(folder: str, *, threads: int, processes: int, seconds: float) -> dict[str, float]:
    """Return pairs a second, and the microseconds of processors for a pair, without a loader."""
    context = multiprocessing.get_context("spawn")
    counted = context.SimpleQueue()
    path = str(next(Path(folder).glob("*.tar")))
    count = max(1, processes)
    running = [
        context.Process(target=_bare_loop, args=(path, len(share), seconds, counted))
        for share in (range(k, threads, count) for k in range(count))
    ]
    for process in running:
        process.start()
    pairs, cpu = np.sum([counted.get() for _ in running], axis=0)
    for process in running:
        process.join()
    return {"pairs/s": pairs / seconds, "CPU us a pair": 1e6 * cpu / pairs}


def main() -> None:
    """Write the set, then measure every number of threads and processes in turns."""
    parser = interleaved.make_parser(__doc__, warmup=0, repeats=3)
    parser.add_argument("--threads", default="64", help="several: 16,64")
    parser.add_argument("--processes", default="0,2,8", help="several; 0 decodes in this one")
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=4.0)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--real", action="store_true", help="decode and crop")
    instead.add_argument(
        "--floor", action="store_true", help="without a loader; --batch is not read"
    )
    args = parser.parse_args()
    settings = [
        {"threads": int(t), "processes": int(p)}
        for t in args.threads.split(",")
        for p in args.processes.split(",")
    ]
    found: list[list[dict[str, float]]] = [[] for _ in settings]
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder), args.pairs, 8)
        for turn in range(args.warmup + args.repeats):
            for setting, rounds in zip(settings, found, strict=True):
                if args.floor:
                    figures = measure_floor(folder, seconds=args.seconds, **setting)
                else:
                    decoding = DECODING if args.real else SLEEPING
                    figures = measure(
                        folder, decoding=decoding, batch=args.batch, seconds=args.seconds, **setting
                    )
                if turn >= args.warmup:
                    rounds.append(figures)
    rows = [
        setting | {key: interleaved.spread([r[key] for r in rounds]) for key in rounds[0]}
        for setting, rounds in zip(settings, found, strict=True)
    ]
    interleaved.report("feeding", args, rows, cores=len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    # The functions that stand for the decoder are sent by name, which `__main__` is not.
    from benchmarks import feeding

    feeding.main()
