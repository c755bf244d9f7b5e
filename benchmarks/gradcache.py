"""GradCache against the plain step, side by side: time a pair, and memory of activations.

    python -m benchmarks.gradcache --batch 64 --microbatches 8

Both take the whole batch's exact gradient; GradCache holds one micro-batch's activations at a time
and computes the forward pass twice. Memory is what the compiled step asks for beside its inputs
and outputs, less one set of gradients, which both of them hold. Each step has a process of its own.
"""

import argparse

import jax

from benchmarks import compare_open_clip
from benchmarks.interleaved import arguments, ratio, report, spread, take_turns
from benchmarks.runs import Stepper, make_run
from benchmarks.subprocess_calls import Calls, apart


def main(argv: list[str] | None = None) -> None:
    """Prints one table."""
    parser = arguments(__doc__, warmup=1, repeats=3)
    compare_open_clip.add_arguments(parser, batch=64)
    parser.add_argument("--microbatches", type=int, default=8)
    options = parser.parse_args(argv)
    calls, activations, losses = {}, {}, {}
    for name, size in (("plain", 0), ("gradcache", options.batch // options.microbatches)):
        made, (activations[name], gradients) = apart(step_of, options, size)
        calls[name] = made["step"]
        losses[name] = calls[name]()
    times = take_turns(calls, warmup=options.warmup, repeats=options.repeats)
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
    report("gradcache", options, rows, gradients_MB=gradients / 1e6)


def step_of(options: argparse.Namespace, microbatch_size: int) -> tuple[Calls, tuple[int, int]]:
    """A step, its activations' bytes and its gradients'."""
    _, loaded, batch = compare_open_clip.prepare(options)
    gradients = sum(x.nbytes for x in jax.tree.leaves(loaded.params))
    run = make_run(options, loaded, batch.images, batch.tokens, microbatch_size=microbatch_size)
    step = run.step.lower(run.state, run.batch).compile()
    activations = step.memory_analysis().temp_size_in_bytes - gradients
    return {"step": Stepper(run, step)}, (activations, gradients)


if __name__ == "__main__":
    main()
