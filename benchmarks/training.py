"""Training steps of clip_jax and open_clip, side by side: the same weights, batch and optimizer.

    python -m benchmarks.training --batch 32
    python -m benchmarks.training --device gpu --dtype bfloat16 --model ViT-B-16 --batch 512

A step is the whole of it: uint8 images normalized, both towers forward and backward, the loss,
AdamW, and the temperature's clip. In every round a square matrix product is timed as well: the
limit that utilization is measured against, in the same weather as the steps. Each library has a
process of its own (`benchmarks/subprocess_calls.py` says why).
"""

import argparse
import statistics
from collections.abc import Callable

import jax
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import compare_open_clip
from benchmarks.interleaved import arguments, ratio, report, seconds, spread, take_turns
from benchmarks.runs import Stepper, make_run
from benchmarks.subprocess_calls import Calls, apart
from clip_jax.models.flops import train_flops_per_pair
from clip_jax.training.metrics import measure_matmul_flops, peak_flops


def main(argv: list[str] | None = None) -> None:
    """Prints one table."""
    parser = arguments(__doc__, warmup=1, repeats=5)
    compare_open_clip.add_arguments(parser, batch=32)
    options = parser.parse_args(argv)
    torch_calls, _ = apart(torch_side, options)
    _, loaded, batch = compare_open_clip.prepare(options)
    calls: Calls = {
        "clip_jax": Stepper(make_run(options, loaded, batch.images, batch.tokens)),
        "open_clip": torch_calls["open_clip"],
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
        "open_clip": torch_calls["flops"](),
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


def torch_side(options: argparse.Namespace) -> tuple[Calls, None]:
    """open_clip's step, and the count of its matrix products, which takes a step too."""
    model, _, batch = compare_open_clip.prepare(options)
    step = compare_open_clip.make_torch_step(options, model, batch)
    return {"open_clip": step, "flops": lambda: torch_flops(step)}, None


def torch_flops(step: Callable[[], float]) -> int:
    """Matrix products of one step, by PyTorch's own count."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
