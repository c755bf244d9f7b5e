"""GradCache against the plain step, side by side: time a pair, and memory of activations.

    python -m benchmarks.gradcache --batch 64 --microbatches 8

Both take the whole batch's exact gradient; GradCache holds one micro-batch's activations at a time
and computes the forward pass twice. Memory is what the compiled step asks for beside its inputs
and outputs, less one set of gradients, which both of them hold. Each step has a process of its own.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import jax

from benchmarks import compare_open_clip
from benchmarks.interleaved import make_parser, ratio, report, spread, time_interleaved
from benchmarks.runs import Stepper, make_run
from benchmarks.subprocess_calls import Calls, in_subprocess


def main(argv: list[str] | None = None) -> None:
    """Measure and print one table."""
    parser = make_parser(__doc__, warmup=1, repeats=3)
    compare_open_clip.add_arguments(parser, batch=64)
    parser.add_argument("--microbatches", type=int, default=8)
    options = parser.parse_args(argv)
    calls, activations, gradients, losses = {}, {}, {}, {}
    sizes = {"plain": 0, "gradcache": options.batch // options.microbatches}
    with ThreadPoolExecutor() as pool:  # both compile at once
        steps = pool.map(lambda size: in_subprocess(make_step_call, options, size), sizes.values())
    for name, (step_calls, facts) in zip(sizes, steps, strict=True):
        calls[name] = step_calls["step"]
        activations[name], gradients[name] = facts
        losses[name] = calls[name]()
    times = time_interleaved(calls, warmup=options.warmup, repeats=options.repeats)
    rows = [
        {
            "step": name,
            "ms a pair": spread(times[name]).scaled(1e3 / options.batch),
            "time": ratio(times[name], times["plain"]),
            "activations, MB": activations[name] / 1e6,
            "memory": activations[name] / activations["plain"],
            "first loss": f"{losses[name]:.7f}",
        }
        for name in calls
    ]
    report("gradcache", options, rows, gradients_MB=gradients["plain"] / 1e6)


def make_step_call(
    options: argparse.Namespace, microbatch_size: int
) -> tuple[Calls, tuple[int, int]]:
    """Return a step, the bytes of its activations, and those of its gradients."""
    _, loaded, batch = compare_open_clip.prepare(options)
    gradients = sum(x.nbytes for x in jax.tree.leaves(loaded.params))
    run = make_run(options, loaded, batch.images, batch.tokens, microbatch_size=microbatch_size)
    step = run.step.lower(run.state, run.batch).compile()
    activations = step.memory_analysis().temp_size_in_bytes - gradients
    return {"step": Stepper(run, step)}, (activations, gradients)


if __name__ == "__main__":
    main()
