"""Is the data fast enough? `python -m clip_jax.data.bench SOURCE --model ViT-B/32 --device h100`.

SOURCE is what `config.data.train` takes. Measures each stage on this machine and sets the whole
loader against what the accelerator would take. Files read lately come from the system's memory.
"""

import argparse
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from clip_jax.data.dataset import open_sources
from clip_jax.data.sample_reader import SampleShape
from clip_jax.data.skip_log import SkipLog
from clip_jax.data.stages import PARTS, Settings, Stage, measure_loader, measure_parts
from clip_jax.errors import UserError, run_command
from clip_jax.models.flops import train_flops_per_pair
from clip_jax.planning.hardware import find_device
from clip_jax.progress_bar import progress_bar
from clip_jax.sections import DataSection
from clip_jax.tokenizers import make_tokenizer
from clip_jax.training.setup import sized_model

ENOUGH = 1.2
"""So many times the accelerator's rate are called enough: a step's time is never quite even."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.data.bench", description=__doc__)
    parser.add_argument("source", nargs="+", help="tar shards, a table, records, a folder, a URL")
    parser.add_argument("--model", default="ViT-B/32", help="a row of clip_jax.list_models()")
    parser.add_argument("--device", default="h100", help="h100, a100, tpu-v5e, ... as in plan")
    parser.add_argument("--devices", type=int, default=1, help="that this machine would feed")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 or float32")
    parser.add_argument("--utilisation", type=float, default=0.5, help="share of the peak reached")
    parser.add_argument("--image-size", type=int, default=0, help="pixels; 0 is the model's own")
    parser.add_argument("--batch-size", type=int, default=256, help="pairs of a batch")
    parser.add_argument("--tokenizer", default="clip", help="as config.data.tokenizer")
    parser.add_argument("--threads", default="4", help="of the loader; several: 1,2,4")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each stage")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class Need:
    """What an accelerator takes.

    Attributes:
      tokens: length of a caption after trimming.
      flops: operations of one pair's training step.
      rate: pairs a second of all devices together.
    """

    model: str
    device: str
    devices: int
    dtype: str
    utilisation: float
    tokens: int
    flops: int
    rate: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether the data keeps the devices busy.

    Attributes:
      rate: the best loader's, pairs a second.
      busy: share of the time for which the devices would compute.
      cores: processor cores, as fast as these, that would keep them busy.
    """

    rate: float
    busy: float
    cores: float
    enough: bool


def need_of(
    model: str,
    tokenizer: Any,
    tokens: int,
    *,
    device: str,
    devices: int,
    dtype: str,
    utilisation: float,
    image_size: int = 0,
) -> Need:
    """What a model on these devices takes, at a share of the published peak.

    Raises:
      UserError: no such model or device, or a number is out of range.
    """
    config = sized_model(model, tokenizer, image_size=image_size)
    if not config.text.supports_trimming:
        tokens = config.text.context_length
    flops = train_flops_per_pair(config, tokens)
    rate = utilisation * find_device(device).peak(dtype) * devices / flops
    return Need(model, device, devices, dtype, utilisation, tokens, flops, rate)


def verdict_of(loaders: Sequence[Stage], need: Need) -> Verdict:
    """The best of the loaders against the need."""
    best = max(loaders, key=lambda stage: stage.rate)
    share = best.rate / need.rate
    cores = ENOUGH * need.rate * best.cpu_ms / 1000
    return Verdict(best.rate, min(1.0, share), cores, share >= ENOUGH)


def bench_text(stages: Sequence[Stage], need: Need, verdict: Verdict) -> str:
    """What the command prints."""
    lines = [f"{'stage':<22} {'pairs/s':>10}  {'CPU ms a pair':>13}"]
    lines += [f"{s.name:<22} {s.rate:>10,.0f}  {s.cpu_ms:>13.3f}" for s in stages]
    lines.append(
        f"{need.model} on {need.devices} x {need.device}, {need.dtype}, at {need.utilisation:.0%}"
        f" of the peak, {need.tokens} tokens: {need.rate:,.0f} pairs/s"
        f" ({need.flops / 1e9:,.1f} GFLOP a pair)"
    )
    share = verdict.rate / need.rate
    if verdict.enough:
        lines.append(f"the data feeds it: {share:,.2f} times what it takes")
    elif share >= 1:
        lines.append(
            f"the data feeds it barely: {share:.2f} times what it takes; at least {ENOUGH}"
        )
    else:
        lines.append(
            f"the data starves it: it would compute {verdict.busy:.1%} of the time and wait for the"
            " rest"
        )
    lines.append(
        f"about {max(1, round(verdict.cores)):,} cores like these {os.cpu_count()} would feed it"
    )
    return "\n".join(lines)


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Measure as the flags say; stages, need and verdict.

    Raises:
      UserError: a flag is wrong, or the source cannot be read.
    """
    for flag, value in (
        ("--devices", args.devices),
        ("--seconds", args.seconds),
        ("--batch-size", args.batch_size),
    ):
        if not value > 0:
            raise UserError(f"{flag} is {value:g}; it must be above 0")
    if not 0 < args.utilisation <= 1:
        raise UserError(f"--utilisation is {args.utilisation:g}; it takes 0 < share <= 1, 0.5 say")
    if not all(n.isdigit() for n in args.threads.split(",")):
        raise UserError(f"--threads {args.threads}: numbers with commas, such as 1,2,4")
    tokenizer = make_tokenizer(args.tokenizer)
    about = {"device": args.device, "devices": args.devices, "dtype": args.dtype}
    about |= {"utilisation": args.utilisation, "image_size": args.image_size}
    need_of(args.model, tokenizer, 16, **about)  # a wrong name answers before anything is measured
    config = sized_model(args.model, tokenizer, image_size=args.image_size)
    shape = SampleShape(config.vision.image_size, config.text.context_length)
    settings = Settings(shape, args.batch_size, DataSection())
    opened = open_sources(args.source, log=SkipLog())
    indexes = [index for one in opened for index in one]
    numbers = [int(n) for n in args.threads.split(",")]
    loaders, lengths = [], Counter[int]()
    with progress_bar(len(numbers) + PARTS, "bench", "stage") as progress:
        stages = measure_parts(indexes, tokenizer, settings, seconds=args.seconds)
        progress.update(PARTS)
        for threads in numbers:
            stage, found = measure_loader(
                indexes, tokenizer, settings, threads=threads, seconds=args.seconds
            )
            loaders.append(stage)
            lengths += found
            progress.update(1)
    need = need_of(args.model, tokenizer, lengths.most_common(1)[0][0], **about)
    return {"stages": [*stages, *loaders], "need": need, "verdict": verdict_of(loaders, need)}


def main() -> int:
    """Parse and measure; the exit code."""
    args = parse(None)
    found = bench(args)
    if args.json:
        stages = [
            {"name": s.name, "pairs_per_second": s.rate, "cpu_ms": s.cpu_ms}
            for s in found["stages"]
        ]
        parts = {key: dataclasses.asdict(found[key]) for key in ("need", "verdict")}
        print(json.dumps({"stages": stages, **parts}, indent=1))
    else:
        print(bench_text(found["stages"], found["need"], found["verdict"]))
    return 0


if __name__ == "__main__":
    run_command(main)
