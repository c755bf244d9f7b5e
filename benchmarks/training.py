"""Training steps of clip_jax and open_clip, side by side: the same weights, batch and optimizer.

    python -m benchmarks.training --batch 32
    python -m benchmarks.training --device gpu --dtype bfloat16 --model ViT-B-16 --batch 512

A step is the whole of it: uint8 images normalized, both towers forward and backward, the loss,
AdamW, and the temperature's clip. In every round a square matrix product is timed as well: the
limit that utilization is measured against, under the same load as the steps; on a GPU that is its
published peak. Each library has a process of its own (`benchmarks/subprocess_calls.py` says why).
Both hold their memory at once; `benchmarks/on_gpu.py` gives each the whole GPU in turn.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import jax
import torch

from benchmarks import compare_open_clip
from benchmarks.interleaved import make_parser, ratio, report, seconds, spread, time_interleaved
from benchmarks.runs import Stepper, make_run
from benchmarks.subprocess_calls import Calls, in_subprocess
from clip_jax.models.flops import train_flops_per_pair
from clip_jax.training.metrics import measure_matmul_flops, peak_flops


def main(argv: list[str] | None = None) -> None:
    """Measure and print one table."""
    parser = make_parser(__doc__, warmup=1, repeats=5)
    compare_open_clip.add_arguments(parser, batch=32)
    options = parser.parse_args(argv)
    torch_calls, torch_facts = first_torch_step(options)
    stepper, facts = first_step(options)
    calls: Calls = {"clip_jax": stepper, "open_clip": torch_calls["open_clip"]}
    firsts = {"clip_jax": facts["first"], "open_clip": torch_facts}
    rates: list[float] = []
    published_peak = peak_flops(jax.devices()[0].device_kind, options.dtype)

    def matmul() -> None:
        rates.append(published_peak or measure_matmul_flops(options.dtype))

    times = time_interleaved(
        calls | {"matmul": matmul}, warmup=options.warmup, repeats=options.repeats
    )
    peak = statistics.median(rates[options.warmup :])
    flops = {"clip_jax": facts["flops"], "open_clip": torch_calls["flops"]()}
    memory = {"clip_jax": device_memory(), "open_clip": torch_calls["memory"]()}
    rows = [
        {
            "library": name,
            "pairs/s": spread(times[name]).per(options.batch),
            "step, s": spread(times[name]),
            "GFLOP a pair": flops[name] / options.batch / 1e9,
            "utilization": flops[name] / spread(times[name]).median / peak,
            "first step, s": firsts[name][0],
            "first loss": f"{firsts[name][1]:.7f}",
        }
        | ({"GPU memory, GB": memory[name] / 1e9} if memory[name] else {})
        for name in calls
    ]
    report(
        "training",
        options,
        rows,
        speedup=ratio(times["open_clip"], times["clip_jax"]),
        loss_difference=abs(firsts["clip_jax"][1] - firsts["open_clip"][1]),
        device=jax.devices()[0].device_kind,
        matrix_products_GFLOP_s=peak / 1e9,
        matrix_products_from="published peak" if published_peak else "measured in every round",
        tokens_a_caption=facts["tokens_a_caption"],
        tokens_computed=facts["tokens_computed"],
    )


def first_step(options: argparse.Namespace) -> tuple[Stepper, dict[str, Any]]:
    """Return clip_jax's step, called once, and its facts; `first` is (seconds, loss)."""
    _, loaded, batch = compare_open_clip.prepare(options)
    stepper = Stepper(make_run(options, loaded, batch.images, batch.tokens))
    length = batch.tokens.shape[1]
    return stepper, {
        "first": timed(stepper),
        "flops": options.batch * train_flops_per_pair(loaded.config, length),
        "tokens_a_caption": batch.tokens_a_caption,
        "tokens_computed": length,
    }


def first_torch_step(options: argparse.Namespace) -> tuple[Calls, tuple[float, float]]:
    """Return open_clip's calls in their own process, and the (seconds, loss) of its first step."""
    calls, _ = in_subprocess(torch_side, options)
    return calls, timed(calls["open_clip"])


def timed(step: Callable[[], float]) -> tuple[float, float]:
    """Return the seconds of a step and its loss."""
    losses: list[float] = []
    return seconds(lambda: losses.append(step())), losses[0]


def device_memory() -> int:
    """Return the most bytes of the GPU that JAX has held; 0 where it does not count."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def torch_side(options: argparse.Namespace) -> tuple[Calls, None]:
    """Return open_clip's step, the count of its matrix products, and the memory it has held."""
    model, _, batch = compare_open_clip.prepare(options)
    step = compare_open_clip.make_torch_step(options, model, batch)
    calls: Calls = {
        "open_clip": lambda: step().item(),
        "flops": lambda: compare_open_clip.count_torch_flops(options, model, batch),
        "memory": lambda: torch.cuda.max_memory_allocated() if options.device == "gpu" else 0,
    }
    return calls, None


if __name__ == "__main__":
    main()
