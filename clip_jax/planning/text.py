"""The text of a plan, as the command prints it."""

import math
from collections.abc import Callable, Iterator

from clip_jax.parallel.mesh import mesh_text
from clip_jax.planning.counts import COLLECTIVES
from clip_jax.planning.estimate import USABLE, Change
from clip_jax.planning.memory import STATE
from clip_jax.planning.plan import Plan, days
from clip_jax.planning.scopes import in_loss

NOTES = """\
The compiler's: memory, operations and collectives, of the real step partitioned for this mesh and
compiled for CPUs. A CPU computes bfloat16 products in float32 and fuses less, so that a GPU or TPU
needs less for activations; it also sums gradients with all-reduce where those use reduce-scatter.
Estimated: seconds, from published rates; temporaries by kind, from the scopes in the program."""


def plan_text(plan: Plan) -> str:
    """Return a plan as text."""
    lines = [
        *_head(plan),
        "",
        *_memory(plan),
        "",
        *_operations(plan),
        "",
        *_collectives(plan),
        "",
        *_time(plan),
        "",
        _run(plan),
        "",
        NOTES,
    ]
    return "\n".join(lines)


def _head(plan: Plan) -> Iterator[str]:
    p, m, train = plan.costs.parameters, plan.config.model, plan.config.train
    yield (
        f"{m.name}: {p['total']:,} parameters, image tower {p['image']:,}, text tower {p['text']:,}"
    )
    yield (
        f"{plan.devices} x {plan.device_name}: {mesh_text(plan.costs.mesh)}; batch "
        f"{train.batch_size:,}, {plan.costs.rows} pairs a device; {m.dtype}, remat={m.remat}, "
        f"scan={m.scan}, microbatch_size={train.microbatch_size}"
    )


def _memory(plan: Plan) -> Iterator[str]:
    yield "memory of a device at the peak"
    for kind, size in plan.costs.memory.kinds.items():
        yield f"  {kind:<24}{format_bytes(size):>12}"
    yield f"  {'in all':<24}{format_bytes(plan.costs.memory.total):>12}"
    yield (
        f"  {'fits' if plan.fits else 'does not fit'}: {100 * plan.memory_share:.0f} % of the "
        f"{plan.device_name}'s {plan.device.memory / 1e9:.0f} GB, of which a program can count on "
        f"{100 * USABLE:.0f} %"
    )
    if plan.changes:
        yield "  what to change, any one or several of:"
        yield from (f"    --{change_text(plan, change)}" for change in plan.changes)


def change_text(plan: Plan, change: Change) -> str:
    """Return the flag that makes a change and the reason for it."""
    return f"config.{change.field}={change.value}: {_REASONS[change.field](plan, change)}"


def _fsdp_reason(plan: Plan, change: Change) -> str:
    memory = plan.costs.memory
    state = memory.sum_of(*STATE)
    copies = memory.sum_of("gradients", "copies of parameters")
    then = state * plan.costs.mesh["fsdp"] / change.value
    return (
        f"parameters, moving averages and optimizer {format_bytes(then)} instead of "
        f"{format_bytes(state)}"
        + (f", gradients and copies of parameters {format_bytes(copies)} at most" if copies else "")
    )


_REASONS: dict[str, Callable[[Plan, Change], str]] = {
    "model.dtype": lambda plan, change: "about half the activations",
    "mesh.fsdp": _fsdp_reason,
    "train.microbatch_size": lambda plan, change: (
        f"about {format_bytes(change.memory or 0)} (activations in proportion to the rows), and a "
        "third more computation"
    ),
    "model.remat": lambda plan, change: (
        "the backward pass computes every block again, a third more computation; of a block only "
        "its input stays"
    ),
    "model.scan": lambda plan, change: "gathered parameters live for one block at a time",
}


def _operations(plan: Plan) -> Iterator[str]:
    pairs = plan.config.train.batch_size
    yield "operations (matrix products and convolutions, two a multiply-add)"
    yield f"  {'a step':<24}{plan.flops / 1e15:>12,.2f} PFLOP on all devices"
    yield f"  {'a pair':<24}{plan.flops / pairs / 1e9:>12,.1f} GFLOP"
    yield (
        f"  {'by hand count':<24}{plan.needed_flops / 1e15:>12,.2f} PFLOP are needed: the program "
        f"does {plan.flops / plan.needed_flops:.3f} times that"
    )


def _collectives(plan: Plan) -> Iterator[str]:
    yield "collectives of a step, a device"
    if not plan.costs.collectives:
        yield "  none"
    for part, of_loss in (("towers and update", False), ("loss", True)):
        for kind in COLLECTIVES:
            alike = [
                c
                for c in plan.costs.collectives
                if c.kind == kind and in_loss(c.instruction.op_name) == of_loss
            ]
            if alike:
                count = sum(c.times for c in alike)
                size = sum(c.times * c.bytes for c in alike)
                yield (
                    f"  {kind:<24}{format_bytes(size):>12} in {count:>5}, "
                    f"the largest array {format_bytes(max(c.largest for c in alike))} ({part})"
                )


def _time(plan: Plan) -> Iterator[str]:
    time, device = plan.time, plan.device
    peak = device.peak(plan.config.model.dtype)
    utilization = [plan.model_flop_utilization(s) for s in (time.serial, time.overlapped)]
    rates = [plan.pairs_per_second(s) for s in (time.serial, time.overlapped)]
    yield f"seconds of a step (rates: {device.source})"
    yield (
        f"  {'products':<24}{format_seconds(time.compute):>12} at {100 * plan.utilization:.0f} % "
        f"of {peak / 1e12:,.0f} TFLOP/s"
    )
    yield (
        f"  {'update':<24}{format_seconds(time.update):>12} at "
        f"{device.memory_bandwidth / 1e12:.2f} TB/s"
    )
    yield (
        f"  {'collectives of the loss':<24}{format_seconds(time.loss):>12} nothing runs beside them"
    )
    yield (
        f"  {'other collectives':<24}{format_seconds(time.others):>12} may run beside the products"
    )
    yield (
        f"  {'a step':<24}{format_seconds(time.overlapped):>12} if they all do, "
        f"{format_seconds(time.serial)} if none does"
    )
    yield (
        f"  {'':<24}{rates[0]:>12,.0f} to {rates[1]:,.0f} pairs/s; model FLOP utilization "
        f"{100 * utilization[0]:.0f} to {100 * utilization[1]:.0f} %"
    )


def _run(plan: Plan) -> str:
    train, steps = plan.config.train, plan.steps
    if steps is None:
        steps = int(1e9 / train.batch_size)
        what = (
            f"a billion pairs, {steps:,} steps (config.train.epochs is {train.epochs:g}: "
            "give --pairs, the pairs of an epoch, for the whole run)"
        )
    else:
        what = f"the run, {steps:,} steps"
    least, most = (days(steps, s) for s in (plan.time.overlapped, plan.time.serial))
    hours = 24 * plan.devices
    return (
        f"{what}: {least:,.2f} to {most:,.2f} days, {hours * least:,.0f} to {hours * most:,.0f} "
        "device-hours"
    )


def format_bytes(n: float) -> str:
    """Return bytes in units of powers of 1000, as devices are sold."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= unit:
            return f"{n / unit:,.1f} {name}"
    return f"{n:.0f} B"


def format_seconds(seconds: float) -> str:
    """Return three digits of seconds or milliseconds."""
    digits = max(0, 2 - math.floor(math.log10(max(seconds, 1e-6))))
    return (
        f"{seconds:.{digits}f} s" if seconds >= 1 else f"{1e3 * seconds:.{max(0, digits - 3)}f} ms"
    )
