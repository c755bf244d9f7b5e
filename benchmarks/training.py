"""Training steps of clip_jax and open_clip, side by side: the same weights, batch and optimizer.

    python -m benchmarks.training --batch 32
    python -m benchmarks.training --device gpu --dtype bfloat16 --model ViT-B-16 --batch 512

A step is the whole of it: uint8 images normalized, both towers forward and backward, the loss,
AdamW, and the temperature's clip. In every round a square matrix product is timed as well: the
limit that utilization is measured against, under the same load as the steps. Each library has a
process of its own (`benchmarks/subprocess_calls.py` says why).
"""

import argparse
import statistics
from collections.abc import Callable

import jax
from torch.utils.flop_counter import FlopCounterMode

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
    torch_calls, _ = in_subprocess(torch_side, options)
    _, loaded, batch = compare_open_clip.prepare(options)
    calls: Calls = {
        "clip_jax": Stepper(make_run(options, loaded, batch.images, batch.tokens)),
        "open_clip": torch_calls["open_clip"],
    }
    losses, first_seconds = {}, {}
    for name, call in calls.items():
        first_seconds[name] = seconds(lambda name=name, call=call: losses.__setitem__(name, call()))
    rates: list[float] = []
    published_peak = peak_flops(jax.devices()[0].device_kind, options.dtype)

    def matmul() -> None:
        rates.append(published_peak or measure_matmul_flops(options.dtype))

    times = time_interleaved(
        calls | {"matmul": matmul}, warmup=options.warmup, repeats=options.repeats
    )
    peak = statistics.median(rates[options.warmup :])
    flops = {
        "clip_jax": options.batch * train_flops_per_pair(loaded.config, batch.tokens.shape[1]),
        "open_clip": torch_calls["flops"](),
    }
    rows = [
        {
            "library": name,
            "pairs/s": spread(times[name]).per(options.batch),
            "step, s": spread(times[name]),
            "GFLOP a pair": flops[name] / options.batch / 1e9,
            "utilization": flops[name] / spread(times[name]).median / peak,
            "first step, s": first_seconds[name],
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
        matrix_products_from="published peak" if published_peak else "measured in every round",
        tokens_a_caption=batch.tokens_a_caption,
        tokens_computed=batch.tokens.shape[1],
    )


def torch_side(options: argparse.Namespace) -> tuple[Calls, None]:
    """Return open_clip's step, and the count of its matrix products, which takes a step too."""
    model, _, batch = compare_open_clip.prepare(options)
    step = compare_open_clip.make_torch_step(options, model, batch)
    return {"open_clip": step, "flops": lambda: torch_flops(step)}, None


def torch_flops(step: Callable[[], float]) -> int:
    """Return the operations of one step's matrix products, by PyTorch's own count."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
