"""The text of a plan, as the command prints it."""

import math
import re
from collections.abc import Callable, Iterator

from clip_jax.parallel.mesh import mesh_text
from clip_jax.planning.compilers import Compiler
from clip_jax.planning.counts import COLLECTIVES, Collective
from clip_jax.planning.cycles import CALIBRATION, Timing
from clip_jax.planning.estimate import USABLE, Change
from clip_jax.planning.hlo import Instruction
from clip_jax.planning.memory import STATE
from clip_jax.planning.parts import PARTS, Part
from clip_jax.planning.plan import Plan, RefusedPlan, days
from clip_jax.planning.scopes import in_loss

ON_CPU = """\
The compiler's: memory, operations and collectives, of the real step partitioned for this mesh and
compiled for CPUs. A CPU computes bfloat16 products in float32 and fuses less, so that a GPU or TPU
needs less for activations; it also sums gradients with all-reduce where those use reduce-scatter.
Estimated: seconds, from published rates; temporaries by kind, from the scopes in the program."""
ON_CUDA = """\
The compiler's: memory, collectives and the schedule, of the real step partitioned for this mesh and
compiled for these GPUs, products not tuned. It makes no estimate of time: seconds are from
published rates, and no kernel is quicker."""
ON_TPU = """\
The compiler's: memory, collectives and the schedule, of the real step partitioned for this mesh and
compiled for these TPUs. Estimated: seconds. They are the compiler's own count of cycles, kernels by
their scheduled bundles; each instruction is counted as if it ran alone and never waited for another
device. Collectives: from published rates."""
NOTES = {"cpu": ON_CPU, "cuda": ON_CUDA, "tpu": ON_TPU}
"""By the compiler's platform."""


def plan_text(plan: Plan | RefusedPlan, *, top: int = 0) -> str:
    """Return a plan as text, with so many of the instructions that take longest."""
    if isinstance(plan, RefusedPlan):
        return _refused(plan)
    timing = plan.costs.timing
    lines = [
        *_head(plan),
        "",
        *_memory(plan),
        "",
        *_operations(plan),
        "",
        *_collectives(plan),
        "",
        *(_parts(plan, timing) if timing else _time(plan)),
        "",
        *(_slowest(timing, top) if timing and top else ()),
        _run(plan),
        "",
        NOTES[plan.costs.compiler.platform],
    ]
    return "\n".join(lines)


def _refused(plan: RefusedPlan) -> str:
    """Return one line on a program that does not fit, and what its largest arrays are."""
    refusal = plan.refusal
    largest = "; ".join(
        f"{format_bytes(b.bytes)} {b.shape}"
        + (f" ({scope})" if (scope := _place(b.op_name)) else "")
        for b in refusal.buffers[:LARGEST]
    )
    return (
        f"{plan.config.model.name} on {plan.devices} x {plan.device_name} does not fit: "
        f"{_compiler(plan.compiler)} refused it, {format_bytes(refusal.used)} of the "
        f"{format_bytes(refusal.available)} that a program can have"
        + (f"; its largest arrays: {largest}" if largest else "")
    )


LARGEST = 5
"""Arrays that a refusal names."""


def _place(op_name: str) -> str:
    """Return the last scopes of a path: the block and what it computes."""
    names = [n for n in re.split(r"[/;]", op_name) if re.fullmatch(r"\w+", n)]
    return " ".join(names[-3:])


def _compiler(compiler: Compiler) -> str:
    return f"{_COMPILERS[compiler.platform]} ({compiler.name} {compiler.version})"


_COMPILERS = {
    "cpu": "XLA for CPUs, in place of the devices' own",
    "tpu": "XLA for TPUs",
    "cuda": "XLA for NVIDIA GPUs",
}


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
    yield f"compiled by {_compiler(plan.costs.compiler)}"


def _memory(plan: Plan) -> Iterator[str]:
    yield "memory of a device at the peak"
    for kind, size in plan.costs.memory.kinds.items():
        yield f"  {kind:<24}{format_bytes(size):>12}"
    yield f"  {'in all':<24}{format_bytes(plan.costs.memory.total):>12}"
    share = (
        f"{100 * plan.memory_share:.0f} % of the {plan.device_name}'s "
        f"{plan.device.memory / 1e9:.0f} GB"
    )
    if plan.costs.compiler.platform == "tpu":
        yield f"  fits: {share}; the compiler refuses what does not"
    else:
        yield (
            f"  {'fits' if plan.fits else 'does not fit'}: {share}, of which a program can count "
            f"on {100 * USABLE:.0f} %"
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
    "model.scan": lambda plan, change: (
        "gathered parameters, and what is computed again, live for one block at a time"
    ),
}


def _operations(plan: Plan) -> Iterator[str]:
    pairs = plan.config.train.batch_size
    yield "operations (matrix products and convolutions, two a multiply-add)"
    if plan.flops is None:
        yield f"  {'needed by a step':<24}{plan.needed_flops / 1e15:>12,.2f} PFLOP on all devices"
        yield f"  {'a pair':<24}{plan.needed_flops / pairs / 1e9:>12,.1f} GFLOP"
        return
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
                    + _beside(plan, alike)
                )
    if plan.costs.compiler.is_devices_own and plan.costs.collectives:
        yield (
            f"  {'nothing runs beside':<24}{100 * plan.exposed_share:>10.0f} % of their bytes: "
            f"{format_seconds(plan.exposed_seconds)} at the published rates"
        )


def _beside(plan: Plan, collectives: list[Collective]) -> str:
    """Return how many of these run beside computation, where the schedule is the devices' own."""
    if not plan.costs.compiler.is_devices_own:
        return ""
    count = sum(c.times for c in collectives if c.beside)
    return f"; {count} beside computation"


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


def _parts(plan: Plan, timing: Timing) -> Iterator[str]:
    """Yield the time by part, tower and pass."""
    if plan.is_counted:
        yield "estimated time of a step, ms (the compiler's cycles)"
    else:
        yield (
            "the least time of a step, ms (each kernel's operations at "
            f"{100 * plan.utilization:.0f} % of the peak or its bytes, whichever takes longer)"
        )
    towers = [(tower, way) for tower in ("image", "text") for way in ("forward", "backward")]
    columns = ["image fwd", "bwd", "text fwd", "bwd", "neither", "in all", "share"]
    yield "  " + f"{'':<14}" + "".join(f"{c:>10}" for c in columns)
    by_part, seconds = timing.by_part(), timing.seconds
    for name in PARTS:
        cells = [by_part.get(Part(*tower, name), 0.0) for tower in towers]
        total = sum(s for part, s in by_part.items() if part.name == name)
        if total:
            yield _cells(name, [*cells, total - sum(cells), total], total / seconds)
    cells = [sum(s for part, s in by_part.items() if part[:2] == tower) for tower in towers]
    yield _cells("in all", [*cells, seconds - sum(cells), seconds], 1.0)
    yield from _rates(plan, timing)


def _rates(plan: Plan, timing: Timing) -> Iterator[str]:
    seconds, peak = timing.seconds, plan.device.peak(plan.config.model.dtype)
    if plan.is_counted:
        yield (
            f"  counted: {100 * timing.counted_share:.1f} % of the time; the rest is bytes over "
            "the memory's bandwidth"
        )
    calibration = CALIBRATION.get(plan.device_name)
    yield (
        f"  utilization {100 * plan.model_flop_utilization(seconds):.1f} % of "
        f"{peak / 1e12:,.0f} TFLOP/s by needed operations"
        + (
            f"; calibration: the same count gives a product of 8192 x 8192 matrices "
            f"{100 * calibration:.0f} %"
            if calibration
            else ""
        )
    )
    waits = seconds + plan.exposed_seconds
    yield (
        f"  {plan.pairs_per_second(seconds):,.0f} pairs/s; {plan.pairs_per_second(waits):,.0f} "
        f"with the {format_seconds(plan.exposed_seconds)} of collectives that nothing runs beside"
    )


def _cells(name: str, seconds: list[float], share: float) -> str:
    figures = "".join(f"{1e3 * s:>10.2f}" if s else f"{'':>10}" for s in seconds)
    return f"  {name:<14}{figures}{100 * share:>8.1f} %"


def _slowest(timing: Timing, count: int) -> Iterator[str]:
    yield "the instructions that take longest"
    for t in timing.slowest(count):
        part = " ".join(x for x in t.part if x)
        yield (
            f"  {1e3 * t.seconds:>9.3f} ms in {t.times:>3}  {part:<28} {t.instruction.name} "
            f"{_shapes(t.instruction)} {t.instruction.op_name[-70:]}"
        )
    yield ""


def _shapes(line: Instruction) -> str:
    shapes = [f"{s.dtype}[{','.join(map(str, s.dims))}]" for s in line.shapes]
    return ", ".join(shapes[:2]) + (", ..." if len(shapes) > 2 else "")


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
    each = (plan.time.overlapped, plan.time.serial)
    if plan.costs.timing:
        each = (plan.step_seconds, plan.step_seconds + plan.exposed_seconds)
    least, most = (days(steps, seconds) for seconds in each)
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
