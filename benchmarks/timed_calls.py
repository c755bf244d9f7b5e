"""Time a tree's step and encoders when asked, on standard input and output.

`benchmarks.against_commit` starts this file once for each of two trees, which it finds in
PYTHONPATH; so it imports from `clip_jax` only what both have.

The first line that it prints has the losses of three steps and the digests of the features. After
that it takes the names of calls, one a line, and answers with their seconds.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

import clip_jax
from clip_jax import host_memory
from clip_jax.config import default, resolve
from clip_jax.parallel.mesh import place_batch
from clip_jax.training.setup import build_run, make_step
from clip_jax.training.state import init_state


def make_pairs(size: int, pairs: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images, uint8 [pairs, size, size, 3], and captions of 8 words, int32 [pairs, length].

    CLIP's ids of the start and the end are around each caption.
    """
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (pairs, size, size, 3)).astype(np.uint8)
    tokens = np.zeros((pairs, length), np.int32)
    tokens[:, 0], tokens[:, 9] = 49406, 49407
    tokens[:, 1:9] = rng.integers(1, 40_000, (pairs, 8))
    return images, tokens


def make_training_call(options: argparse.Namespace) -> Callable[[], float]:
    """Return a run's own step, which returns its loss."""
    values = default()
    values.model.name = options.model
    values.model.dtype = "float32"
    values.train.update(
        {"steps": 1000, "batch_size": options.pairs, "microbatch_size": options.microbatch}
    )
    values.data.streams = 1
    values.optim.learning_rate = 1e-5
    config = resolve(values)
    run = build_run(config, config.train.steps)
    state = init_state(run.model, run.optimizer, run.shapes, config.train, seed=0)
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, run.shapes))
    images, tokens = make_pairs(run.model.config.vision.image_size, options.pairs, options.length)
    arrays = {
        "image": images,
        "text": tokens,
        "caption_id": np.arange(options.pairs, dtype=np.uint32),
        "valid": np.ones(options.pairs, bool),
    }
    batch, train_step = place_batch(arrays, run.mesh), make_step(run)

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step


def main() -> None:
    """Answer until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=int, required=True)
    parser.add_argument("--microbatch", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    options = parser.parse_args()
    host_memory.keep_freed_memory()
    step = make_training_call(options)
    facts = {"tree": clip_jax.__file__, "losses": [step() for _ in range(3)]}
    clip = clip_jax.create(options.model)
    images, tokens = make_pairs(
        clip.config.vision.image_size, options.pairs, clip.config.text.context_length
    )
    calls: dict[str, Callable[[], object]] = {
        "step": step,
        "encode_image": lambda: clip.encode_image(images).block_until_ready(),
        "encode_text": lambda: clip.encode_text(tokens).block_until_ready(),
    }
    for name in ("encode_image", "encode_text"):
        facts[name] = hashlib.sha256(np.asarray(calls[name]()).tobytes()).hexdigest()
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        calls[line.strip()]()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
