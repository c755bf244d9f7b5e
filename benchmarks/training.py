"""Training steps of clip_jax and open_clip, side by side: the same weights, batch and optimiser.

    python -m benchmarks.training --batch 32
    python -m benchmarks.training --device gpu --dtype bfloat16 --model ViT-B-16 --batch 512

A step is the whole of it: uint8 pictures normalised, both towers forward and backward, the loss,
AdamW, and the temperature's clip. In every round a square matrix product is timed as well: the
limit that utilisation is measured against, in the same weather as the steps.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import both
from benchmarks.turns import arguments, ratio, report, seconds, spread, take_turns
from clip_jax.api import LoadedCLIP
from clip_jax.config import default, resolve
from clip_jax.mesh import place_batch
from clip_jax.metrics import measure_matmul_flops, peak_flops
from clip_jax.models.flops import train_flops_per_pair
from clip_jax.state import TrainState, state_shapes
from clip_jax.wiring import Wiring, make_step, wire


def make_run(options: argparse.Namespace, loaded: LoadedCLIP, **train: Any) -> tuple[Any, Wiring]:
    """(the config of a run of this model, its parts)."""
    values = default()
    values.train.steps = 1000
    values.train.batch_size = options.batch
    values.data.streams = 1
    values.model.dtype = options.dtype
    values.optim.learning_rate = 1e-5
    values.train.update(train)
    config = resolve(values)
    w = wire(config, config.train.steps)
    # The run's own model with the loaded one's sizes, which are open_clip's.
    model = w.model.clone(config=loaded.config)
    shapes = state_shapes(model, w.optimizer, w.mesh)
    return config, dataclasses.replace(w, model=model, shapes=shapes)


def make_jax_step(
    options: argparse.Namespace, loaded: LoadedCLIP, batch: both.Batch, **train: Any
) -> Callable[[], float]:
    """A training step as `clip_jax.train` makes it; returns the loss."""
    config, w = make_run(options, loaded, **train)
    step, placed = make_step(config, w), place_batch(step_batch(batch), w.mesh)
    # The step gives its state's memory away: it gets a copy.
    params = jax.tree.map(jnp.copy, loaded.params)
    state = TrainState(
        jnp.zeros((), jnp.int32), params, loaded.batch_stats, w.optimizer.init(params)
    )
    kept = [jax.device_put(state, jax.tree.map(lambda x: x.sharding, w.shapes))]

    def call() -> float:
        kept[0], metrics = step(kept[0], placed)
        jax.block_until_ready(kept[0])
        return float(metrics["loss"])

    return call


def step_batch(batch: both.Batch) -> dict[str, np.ndarray]:
    """A batch as the loader hands it over: every row good, every caption another."""
    rows = len(batch.images)
    ids, ok = np.arange(rows, dtype=np.uint32), np.ones(rows, bool)
    return {"image": batch.images, "text": batch.tokens, "caption_id": ids, "ok": ok}


def main(argv: list[str] | None = None) -> None:
    """Prints one table."""
    parser = arguments(__doc__, warmup=1, repeats=5)
    both.add_arguments(parser, batch=32)
    options = parser.parse_args(argv)
    both.set_up(options)
    model, loaded = both.make_models(options)
    batch = both.make_batch(options, loaded)
    calls = {
        "clip_jax": make_jax_step(options, loaded, batch),
        "open_clip": both.make_torch_step(options, model, batch),
    }
    losses, first = {}, {}
    for name, call in calls.items():
        first[name] = seconds(lambda name=name, call=call: losses.__setitem__(name, call()))
    rates: list[float] = []
    known = peak_flops(jax.devices()[0].device_kind, options.dtype)

    def matmul() -> None:
        rates.append(known or measure_matmul_flops(options.dtype))

    times = take_turns(calls | {"matmul": matmul}, warmup=options.warmup, repeats=options.repeats)
    peak = statistics.median(rates[options.warmup :])
    work = {
        "clip_jax": options.batch * train_flops_per_pair(loaded.config, batch.tokens.shape[1]),
        "open_clip": torch_flops(calls["open_clip"]),
    }
    rows = [
        {
            "library": name,
            "pairs/s": spread(times[name]).per(options.batch),
            "step, s": spread(times[name]),
            "GFLOP a pair": work[name] / options.batch / 1e9,
            "utilisation": work[name] / spread(times[name]).median / peak,
            "first step, s": first[name],
            "first loss": f"{losses[name]:.7f}",
        }
        for name in calls
    ]
    report(
        "training",
        options,
        rows,
        speedup=ratio(times["open_clip"], times["clip_jax"]),
        loss_difference=abs(losses["clip_jax"] - losses["open_clip"]),
        matrix_products_GFLOP_s=peak / 1e9,
        matrix_products_from="published peak" if known else "measured in every round",
        tokens_a_caption=batch.tokens_a_caption,
        tokens_computed=batch.tokens.shape[1],
    )


def torch_flops(step: Callable[[], float]) -> int:
    """Matrix products of one step, by PyTorch's own count."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
