"""Training steps of clip_jax and of open_clip with `torch.compile`, each alone on one GPU.

    python -m benchmarks.on_gpu --profile FOLDER
    python -m benchmarks.on_gpu --case ViT-B-16-quickgelu:256 --set model.remat=none

bfloat16, the whole context in both, the same weights and batch. Every library and model has a
process of its own. All compile at once, before the first is measured; nothing runs beside a step
that is measured, and a process ends when its steps are. Memory is the most that its allocator has
held, weights and optimizer included. The loss is read once in ten steps, as a trainer may that
does not wait for each. Profiles are for `benchmarks/kernels.py`.
"""

import argparse
import gzip
import itertools
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import torch

from benchmarks import compare_open_clip
from benchmarks.interleaved import make_parser, report, seconds, spread
from benchmarks.runs import Stepper, make_run
from benchmarks.subprocess_calls import Calls, in_subprocess
from clip_jax.models.flops import train_flops_per_pair
from clip_jax.training.metrics import peak_flops

CASES = ["ViT-B-16-quickgelu:128", "ViT-L-14-quickgelu:64", "ViT-B-32-quickgelu:512"]
PROFILED_STEPS = 3
STEPS_A_READ = 10
Worker = tuple[Calls, dict[str, Any]]
"""A process's calls, its step compiled, and facts about it."""


def main(argv: list[str] | None = None) -> None:
    """Measure case by case, and print the table so far after each."""
    parser = make_parser(__doc__, warmup=3, repeats=5)
    parser.add_argument("--case", action="append", metavar="MODEL:PAIRS", help="default: three")
    parser.add_argument(
        "--profile", type=Path, help="folder for profiles and programs of our steps"
    )
    parser.add_argument("--only", choices=["clip_jax", "open_clip"], help="one library alone")
    compare_open_clip.add_arguments(parser, batch=0)
    parser.set_defaults(device="gpu", dtype="bfloat16", untrimmed=True)
    options = parser.parse_args(argv)
    cases = [case_options(options, case) for case in options.case or CASES]
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor() as pool:
        sides = {"open_clip": torch_side, "clip_jax": jax_side}
        queue = [
            (library, case, pool.submit(in_subprocess, side, case))
            for library, side in sides.items()
            if options.only in (None, library)
            for case in cases
        ]
        wait([started for *_, started in queue])
        while queue:
            rows.append(measure(*queue.pop(0)))
            report("on_gpu", options, rows)


def case_options(options: argparse.Namespace, case: str) -> argparse.Namespace:
    """Return the options of one case."""
    model, _, pairs = case.partition(":")
    return argparse.Namespace(**{**vars(options), "model": model, "batch": int(pairs)})


def measure(library: str, case: argparse.Namespace, started: Future[Worker]) -> dict[str, Any]:
    """Time a process's steps, and profile them where it can; return the row of the table."""
    row: dict[str, Any] = {"model": case.model, "pairs": case.batch, "library": library}
    try:
        calls, facts = started.result()
        start = time.perf_counter()
        loss = calls["first"]()
        facts["seconds"] += time.perf_counter() - start
        for _ in range(case.warmup):
            calls["first"]()
        times = spread([seconds(calls["steps"]) / STEPS_A_READ for _ in range(case.repeats)])
        if case.profile and "profile" in calls:
            calls["profile"]()
    except SystemExit as error:  # it does not fit, say; the other cases go on
        return row | {"failed": str(error)}
    peak = peak_flops(facts["device"], case.dtype)
    return row | {
        "pairs/s": times.per(case.batch),
        "step, ms": times.scaled(1e3),
        "TFLOP/s": facts["flops"] / times.median / 1e12,
        "utilization": facts["flops"] / times.median / peak if peak else "",
        "memory, GB": calls["memory"]() / 1e9,
        "to the first step, s": facts["seconds"],
        "first loss": f"{loss:.5f}",
    }


def jax_side(options: argparse.Namespace) -> tuple[Calls, dict[str, Any]]:
    """Return our step, compiled; `flops` are those that the model needs.

    Its first run is a call of its own: until then it holds none of the memory of a step.
    """
    start = time.perf_counter()
    _, loaded, batch = compare_open_clip.prepare(options)
    run = make_run(options, loaded, batch.images, batch.tokens)
    prepared = time.perf_counter()
    lowered = run.step.lower(run.state, run.batch)
    traced = time.perf_counter()
    step = lowered.compile()
    print(
        f"{options.model}: made in {prepared - start:.1f} s, traced in {traced - prepared:.1f}, "
        f"compiled in {time.perf_counter() - traced:.1f}",
        file=sys.stderr,
    )
    stepper = Stepper(run, step)
    facts = {
        "seconds": time.perf_counter() - start,
        "flops": options.batch * train_flops_per_pair(loaded.config, batch.tokens.shape[1]),
        "device": jax.devices()[0].device_kind,
    }

    def profile() -> None:
        folder = options.profile / options.model
        trace_options = jax.profiler.ProfileOptions()
        trace_options.python_tracer_level = 0
        with jax.profiler.trace(str(folder), profiler_options=trace_options):
            for _ in range(PROFILED_STEPS):
                loss = stepper.dispatch()
            jax.block_until_ready(loss)
        with gzip.open(folder / "program.txt.gz", "wt") as file:
            file.write(step.as_text())

    def memory() -> int:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)

    def steps() -> float:
        for _ in range(STEPS_A_READ):
            loss = stepper.dispatch()
        return float(loss)

    return {"first": stepper, "steps": steps, "memory": memory, "profile": profile}, facts


def torch_side(options: argparse.Namespace) -> tuple[Calls, dict[str, Any]]:
    """Return open_clip's step, compiled, which its first run is; `flops` are PyTorch's count."""
    start = time.perf_counter()
    model, _, batch = compare_open_clip.prepare(options)
    flops = compare_open_clip.count_torch_flops(options, model, batch)
    on_gpu = options.device == "gpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    step = compare_open_clip.make_torch_step(options, model, batch)
    first_loss = step().item()
    if on_gpu:  # what it freed is not kept from the processes that still compile
        torch.cuda.empty_cache()
    facts = {
        "seconds": time.perf_counter() - start,
        "flops": flops,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }
    memory = torch.cuda.max_memory_allocated if on_gpu else int

    def steps() -> float:
        for _ in range(STEPS_A_READ):
            loss = step()
        return loss.item()

    losses = itertools.chain([first_loss], iter(lambda: step().item(), None))
    return {"first": lambda: next(losses), "steps": steps, "memory": memory}, facts


if __name__ == "__main__":
    main()
