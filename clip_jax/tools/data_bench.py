"""Measure whether data is fast enough: `python -m clip_jax.data.bench SOURCE --model ViT-B/32
--device h100`.

SOURCE is what `config.data.train` takes. Each stage is measured on this machine, and the whole
loader is set against what the accelerator would take. Files that were read lately come from the
system's memory.
"""

import argparse
import dataclasses
import json
import math
import os
from argparse import SUPPRESS
from collections import Counter
from collections.abc import Sequence
from typing import Any

from clip_jax.data.dataset import open_all_shards
from clip_jax.data.decode_processes import processes_for
from clip_jax.data.sample_reader import SampleShape
from clip_jax.data.skip_log import SkipLog
from clip_jax.data.stages import PARTS, LoaderSettings, Stage, measure_loader, measure_parts
from clip_jax.errors import UserError, check_counts, run_command
from clip_jax.models.flops import train_flops_per_pair
from clip_jax.planning.hardware import find_device
from clip_jax.progress_bar import progress_bar
from clip_jax.sections import DataSection, ModelSection, TrainSection
from clip_jax.tokenizers import make_tokenizer
from clip_jax.training.setup import sized_model
from clip_jax.typing import Tokenizer

ENOUGH = 1.2
"""So many times the accelerator's rate are called enough: a step's time is never quite even."""
SECONDS = 5.0
"""Time that each stage is measured for."""
UTILIZATION = 0.5
"""Share of the published peak that a device is taken to reach."""

_MODEL, _TRAIN, _DATA = ModelSection(), TrainSection(), DataSection()


@dataclasses.dataclass(frozen=True)
class Need:
    """The pairs that accelerators take.

    Attributes:
      tokens: length of a caption after trimming.
      flops: operations of one pair's training step.
      rate: pairs a second of all devices together.
    """

    model: str
    device: str
    devices: int
    dtype: str
    utilization: float
    tokens: int
    flops: int
    rate: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The comparison of the data with what the devices take.

    Attributes:
      rate: the best loader's, pairs a second.
      busy: share of the time for which the devices would compute.
      cores: processor cores, as fast as these, that would keep them busy.
      enough: whether the rate is `ENOUGH` times what the devices take.
      threads, processes: what `config.data` would say on so many cores.
    """

    rate: float
    busy: float
    cores: float
    enough: bool
    threads: int
    processes: int


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """The stages alone, the whole loader by its threads, and what follows from them."""

    stages: tuple[Stage, ...]
    loaders: tuple[Stage, ...]
    need: Need
    verdict: Verdict


def bench(
    source: Sequence[str],
    *,
    model: str,
    device: str,
    devices: int = 1,
    dtype: str = "bfloat16",
    utilization: float = UTILIZATION,
    image_size: int = _MODEL.image_size,
    batch_size: int = _TRAIN.batch_size,
    tokenizer: str = _DATA.tokenizer,
    threads: Sequence[int] = (_DATA.threads,),
    processes: int = _DATA.processes,
    seconds: float = SECONDS,
) -> BenchResult:
    """Measure how fast data comes, and compare it with what devices take.

    Args:
      source: as `config.data.train` takes them.
      model: an entry of `clip_jax.list_models()`.
      device: as the command `plan` takes it: h100, a100, tpu-v5e, ...
      devices: that this machine would feed.
      dtype: bfloat16 or float32.
      utilization: share of the published peak that is reached.
      image_size: pixels; 0 is the model's own.
      batch_size: pairs of a batch.
      tokenizer: as `config.data.tokenizer`.
      threads: of the loader, which is measured with each number, as `config.data.threads`.
      processes: among which they are shared out, as `config.data.processes`.
      seconds: for each stage.

    Raises:
      UserError: a number is out of range, a name is not known, or the source cannot be read.
    """
    check_counts({"--devices": devices, "--batch-size": batch_size})
    if not seconds > 0:
        raise UserError(f"--seconds is {seconds:g}; it must be above 0")
    if not 0 < utilization <= 1:
        raise UserError(f"--utilization is {utilization:g}; it takes 0 < share <= 1, 0.5 say")
    encode = make_tokenizer(tokenizer)
    config = sized_model(model, encode, image_size=image_size, context_length=0)
    hardware: dict[str, Any] = {"device": device, "devices": devices, "dtype": dtype}
    hardware |= {"utilization": utilization, "image_size": image_size}
    need_of(model, encode, 16, **hardware)  # an unknown name ends before anything is measured
    shape = SampleShape(config.vision.image_size, config.text.context_length)
    shards = open_all_shards(source, log=SkipLog())
    # As many streams as divide the batch and have a pair each; they change the order alone.
    streams = math.gcd(batch_size, min(_DATA.streams, sum(map(len, shards))) or 1)
    section = dataclasses.replace(_DATA, processes=processes, streams=streams)
    settings = LoaderSettings(shape, batch_size, section)
    loaders, lengths = [], Counter[int]()
    with progress_bar(len(threads) + PARTS, "bench", "stage") as progress:
        stages = measure_parts(shards, encode, settings, seconds=seconds)
        progress.update(PARTS)
        for number in threads:
            stage, batch_lengths = measure_loader(
                shards, encode, settings, threads=number, seconds=seconds
            )
            loaders.append(stage)
            lengths += batch_lengths
            progress.update(1)
    need = need_of(model, encode, lengths.most_common(1)[0][0], **hardware)
    return BenchResult(tuple(stages), tuple(loaders), need, verdict_of(loaders, need))


def need_of(
    model: str,
    tokenizer: Tokenizer,
    tokens: int,
    *,
    device: str,
    devices: int,
    dtype: str,
    utilization: float,
    image_size: int,
) -> Need:
    """Return what a model on these devices takes, at a share of the published peak.

    Raises:
      UserError: no such model or device, or a number is out of range.
    """
    config = sized_model(model, tokenizer, image_size=image_size, context_length=0)
    if not config.text.supports_trimming:
        tokens = config.text.context_length
    flops = train_flops_per_pair(config, tokens)
    rate = utilization * find_device(device).peak(dtype) * devices / flops
    return Need(model, device, devices, dtype, utilization, tokens, flops, rate)


def verdict_of(loaders: Sequence[Stage], need: Need) -> Verdict:
    """Compare the best of the loaders with the need."""
    best = max(loaders, key=lambda stage: stage.rate)
    share = best.rate / need.rate
    cores = ENOUGH * need.rate * best.cpu_ms / 1000
    threads = max(1, math.ceil(cores))
    processes = processes_for(threads)
    return Verdict(best.rate, min(1.0, share), cores, share >= ENOUGH, threads, processes)


def result_text(result: BenchResult) -> str:
    """Return what the command prints."""
    need, verdict = result.need, result.verdict
    lines = [f"{'stage':<22} {'pairs/s':>10}  {'CPU ms a pair':>13}"]
    lines += [
        f"{stage.name:<22} {stage.rate:>10,.0f}  {stage.cpu_ms:>13.3f}"
        for stage in (*result.stages, *result.loaders)
    ]
    lines.append(
        f"{need.model} on {need.devices} x {need.device}, {need.dtype}, at {need.utilization:.0%}"
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
        f"about {max(1, round(verdict.cores)):,} cores like these {os.cpu_count()} would feed it,"
        f" with config.data.threads={verdict.threads} in {max(1, verdict.processes)} process"
        + "es"
        * (verdict.processes > 1)
    )
    return "\n".join(lines)


def result_json(result: BenchResult) -> dict[str, Any]:
    """Return what the command prints with `--json`."""
    need = dataclasses.asdict(result.need)
    return {
        "stages": [
            {"name": stage.name, "pairs_per_second": stage.rate, "cpu_ms": stage.cpu_ms}
            for stage in (*result.stages, *result.loaders)
        ],
        # The key has the spelling that it was published with.
        "need": {"utilisation" if k == "utilization" else k: v for k, v in need.items()},
        "verdict": dataclasses.asdict(result.verdict),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.data.bench", description=__doc__)
    add = parser.add_argument
    add("source", nargs="+", help="tar shards, a table, records, a folder, a URL")
    add("--model", default=_MODEL.name, help="an entry of clip_jax.list_models()")
    add("--device", default="h100", help="h100, a100, tpu-v5e, ... as in plan")
    add("--devices", type=int, default=1, help="that this machine would feed")
    add("--dtype", default="bfloat16", help="bfloat16 or float32")
    add("--utilization", type=float, default=UTILIZATION, help="share of the peak reached")
    add("--utilisation", type=float, dest="utilization", default=SUPPRESS, help=SUPPRESS)
    add("--image-size", type=int, default=_MODEL.image_size, help="pixels; 0 is the model's own")
    add("--batch-size", type=int, default=_TRAIN.batch_size, help="pairs of a batch")
    add("--tokenizer", default=_DATA.tokenizer, help="as config.data.tokenizer")
    add(
        "--threads",
        default=str(_DATA.threads),
        help="of the loader; several: 1,2,4; -1: every core",
    )
    add("--processes", type=int, default=_DATA.processes, help="as config.data.processes")
    add("--seconds", type=float, default=SECONDS, help="for each stage")
    add("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args(argv)
    numbers = args.threads.split(",")
    if not all(number == "-1" or number.isdigit() for number in numbers):
        raise UserError(f"--threads {args.threads}: numbers with commas, such as 1,2,4, or -1")
    args.threads = [int(number) for number in numbers]
    return args


def main() -> int:
    """Parse the flags, measure and print the result; return the exit code."""
    args = vars(parse(None))
    as_json = args.pop("json")
    result = bench(**args)
    print(json.dumps(result_json(result), indent=1) if as_json else result_text(result))
    return 0


if __name__ == "__main__":
    run_command(main)
