"""Loading a checkpoint against reading its bytes, side by side in one process: time and memory.

    python -m benchmarks.load --model ViT-L/14

A file of random weights is written in each format, then read and loaded in turns. The file is in
the page cache from the first turn on, for both. Memory is the process's own (RssAnon): pages of a
mapped file are not counted, since the system takes them back when it needs them.
"""

import ctypes
import gc
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import clip_jax
from benchmarks.interleaved import arguments, ratio, report, spread
from clip_jax.data.images import OPENAI
from clip_jax.models.zoo import model_config
from clip_jax.pretrained.export import WRITERS
from clip_jax.pretrained.trees import array_shapes
from clip_jax.pretrained.work_folder import RunDescription
from clip_jax.tokenizers import TokenizerSpec

WEIGHTS = {
    "own": "model.safetensors",
    "open_clip": "open_clip_model.safetensors",
    "hf": "model.safetensors",
}


def own_memory() -> int:
    """Bytes of memory that are the process's own."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


def measured(work: Callable[[], object]) -> tuple[float, int]:
    """(seconds, most bytes above the start) of one call, whose result is kept to its end."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would be counted as ours
    before, most, done = own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.05):
            most = max(most, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    most = max(most, own_memory())
    done.set()
    watcher.join()
    del result
    return seconds, most - before


def main(argv: list[str] | None = None) -> None:
    """Prints one table."""
    parser = arguments(__doc__, warmup=0, repeats=5)
    parser.add_argument("--model", default="ViT-L/14")
    options = parser.parse_args(argv)
    config = model_config(options.model)
    rng = np.random.default_rng(0)
    arrays = {
        path: rng.standard_normal(shape, np.float32) for path, shape in array_shapes(config).items()
    }
    about = RunDescription(options.model, config, TokenizerSpec(), OPENAI)
    weights = sum(x.nbytes for x in arrays.values()) / 1e6
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for form in WEIGHTS:
            (Path(folder) / form).mkdir()
            WRITERS[form](Path(folder) / form, about, arrays)
        arrays.clear()
        for form, name in WEIGHTS.items():
            target = Path(folder) / form
            reads, loads, memory = [], [], []
            for _ in range(options.repeats):
                reads.append(measured((target / name).read_bytes)[0])
                seconds, most = measured(
                    lambda target=target: jax.block_until_ready(clip_jax.load(target).params)
                )
                loads.append(seconds)
                memory.append(most / (target / name).stat().st_size)
            row = {"format": form, "read, s": spread(reads), "load, s": spread(loads)}
            rows.append(row | {"load / read": ratio(loads, reads), "memory": max(memory)})
    report("load", options, rows, weights_MB=weights, memory="most above the start / weights")


if __name__ == "__main__":
    main()
