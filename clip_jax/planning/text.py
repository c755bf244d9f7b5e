"""What the planner prints."""

import math
from collections.abc import Iterator

from clip_jax.parallel.mesh import mesh_text
from clip_jax.planning.counts import COLLECTIVES
from clip_jax.planning.estimate import (
    USABLE,
    Times,
    advice,
    days,
    gigabytes,
    is_of_loss,
    rounded,
    run_steps,
    step_times,
)
from clip_jax.planning.hardware import Device
from clip_jax.planning.program import Facts
from clip_jax.sections import Config

NOTES = """\
The compiler's: memory, operations and collectives, of the real step partitioned for this mesh and
compiled for CPUs. A CPU computes bfloat16 products in float32 and fuses less, so that a GPU or TPU
needs less for activations; it also sums gradients with all-reduce where those use reduce-scatter.
Reckoned: seconds, from published rates; activations by kind, from names in the program."""


def plan_text(
    facts: Facts,
    config: Config,
    device_name: str,
    device: Device,
    *,
    utilisation: float,
    pairs: int | None,
) -> str:
    """The whole answer.

    Raises:
      UserError: no rate is published for the config's dtype on this device.
    """
    times = step_times(facts, device, config.model.dtype, utilisation)
    lines = [
        *_head(facts, config, device_name),
        "",
        *_memory(facts, config, device_name, device),
        "",
        *_operations(facts, config),
        "",
        *_exchanges(facts),
        "",
        *_time(times, facts, config, device, utilisation),
        *_run(times, facts, config, pairs),
        "",
        NOTES,
    ]
    return "\n".join(lines)


def _devices(facts: Facts) -> int:
    return math.prod(facts.mesh.values())


def _head(facts: Facts, config: Config, device_name: str) -> Iterator[str]:
    p, m = facts.parameters, config.model
    yield (
        f"{m.name}: {p['total']:,} parameters, image tower {p['image']:,}, text tower {p['text']:,}"
    )
    yield (
        f"{_devices(facts)} x {device_name}: {mesh_text(facts.mesh)}; batch "
        f"{config.train.batch_size:,}, {facts.rows} pairs a device; {m.dtype}, remat={m.remat}, "
        f"scan={m.scan}, microbatch_size={config.train.microbatch_size}"
    )


def _memory(facts: Facts, config: Config, device_name: str, device: Device) -> Iterator[str]:
    yield "memory of a device at the peak"
    for kind, size in facts.memory.kinds.items():
        yield f"  {kind:<24}{gigabytes(size):>12}"
    total, share = facts.memory.total, facts.memory.total / device.memory
    yield f"  {'in all':<24}{gigabytes(total):>12}"
    change = advice(facts, config, device)
    yield (
        f"  {'does not fit' if change else 'fits'}: {100 * share:.0f} % of the {device_name}'s "
        f"{device.memory / 1e9:.0f} GB, of which a program can count on {100 * USABLE:.0f} %"
    )
    if change:
        yield "  what to change, any one or several of:"
        yield from (f"    --{line}" for line in change)


def _operations(facts: Facts, config: Config) -> Iterator[str]:
    devices = _devices(facts)
    total, hand = facts.flops * devices, facts.hand_flops * devices
    yield "operations (matrix products and convolutions, two a multiply-add)"
    yield f"  {'a step':<24}{total / 1e15:>12,.2f} PFLOP on all devices"
    yield f"  {'a pair':<24}{total / config.train.batch_size / 1e9:>12,.1f} GFLOP"
    yield (
        f"  {'by hand count':<24}{hand / 1e15:>12,.2f} PFLOP are needed: the program does "
        f"{total / hand:.3f} times that"
    )


def _exchanges(facts: Facts) -> Iterator[str]:
    yield "collectives of a step, a device"
    if not facts.exchanges:
        yield "  none"
    for where, in_loss in (("towers and update", False), ("loss", True)):
        for kind in COLLECTIVES:
            found = [x for x in facts.exchanges if x.kind == kind and is_of_loss(x) == in_loss]
            if found:
                count = sum(x.times for x in found)
                size = sum(x.times * x.bytes for x in found)
                yield (
                    f"  {kind:<24}{gigabytes(size):>12} in {count:>5}, "
                    f"the largest array {gigabytes(max(x.largest for x in found))} ({where})"
                )


def _time(
    times: Times,
    facts: Facts,
    config: Config,
    device: Device,
    utilisation: float,
) -> Iterator[str]:
    peak = device.peak(config.model.dtype)
    yield f"seconds of a step (rates: {device.source})"
    yield (
        f"  {'products':<24}{rounded(times.compute):>12} at {100 * utilisation:.0f} % of "
        f"{peak / 1e12:,.0f} TFLOP/s"
    )
    yield f"  {'update':<24}{rounded(times.update):>12} at {device.memory_rate / 1e12:.2f} TB/s"
    yield f"  {'collectives of the loss':<24}{rounded(times.loss):>12} nothing runs beside them"
    yield f"  {'other collectives':<24}{rounded(times.others):>12} may run beside the products"
    yield (
        f"  {'a step':<24}{rounded(times.least):>12} if they all do, {rounded(times.most)} if none "
        f"does"
    )
    useful = facts.hand_flops / peak
    yield (
        f"  {'':<24}{config.train.batch_size / times.most:>12,.0f} to "
        f"{config.train.batch_size / times.least:,.0f} pairs/s; model FLOP utilization "
        f"{100 * useful / times.most:.0f} to {100 * useful / times.least:.0f} %"
    )


def _run(times: Times, facts: Facts, config: Config, pairs: int | None) -> Iterator[str]:
    steps = run_steps(config, pairs)
    if steps is None:
        steps = int(1e9 / config.train.batch_size)
        what = (
            f"a billion pairs, {steps:,} steps (config.train.epochs is {config.train.epochs:g}: "
            "give --pairs, the pairs of an epoch, for the whole run)"
        )
    else:
        what = f"the run, {steps:,} steps"
    least, most = days(steps, times.least), days(steps, times.most)
    hours = 24 * _devices(facts)
    yield ""
    yield (
        f"{what}: {least:,.2f} to {most:,.2f} days, {hours * least:,.0f} to {hours * most:,.0f} "
        "device-hours"
    )
