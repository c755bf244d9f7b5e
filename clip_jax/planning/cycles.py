"""The time of a TPU's program, as its compiler estimates it: cycles, instruction by instruction.

It is an estimate. The compiler counts each instruction as if it ran alone, and nothing waits for
another device. `CALIBRATION` says what share of the peak the same estimate gives a large product.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

from clip_jax.planning.counts import is_collective
from clip_jax.planning.hardware import Device
from clip_jax.planning.hlo import Instruction, Program, Visit, step_visits
from clip_jax.planning.parts import Part, part_of

CLOCKS = {"tpu-v4": 1.05e9, "tpu-v5e": 1.5e9, "tpu-v5p": 1.75e9, "tpu-v6e": 1.75e9}
"""Cycles a second, by device: the published peak over the operations of the matrix units' cells,
two a cycle."""
CALIBRATION = {"tpu-v4": 0.93, "tpu-v5e": 0.88, "tpu-v5p": 0.90, "tpu-v6e": 0.70}
"""The share of the peak that the estimate gives a bfloat16 product of 8192 x 8192 matrices."""

_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
FREE = frozenset(
    (
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "add-dependency",
        "opt-barrier",
        "partition-id",
        "replica-id",
        "domain",
        "copy-start",
        "slice-start",
        "async-start",
        "async-update",
        "async-done",
        "call-start",
        "call-done",
        "copy-done",
        "slice-done",
        "send",
        "recv",
        "send-done",
        "recv-done",
    )
)
"""They take no time: names of what is there, or ends of what runs beside other instructions."""


class Timed(NamedTuple):
    """The time of one instruction in a step.

    Attributes:
      instruction: the line.
      times: how often a step runs it.
      seconds: of all of these.
      is_counted: whether it is the compiler's count; otherwise its bytes over the bandwidth.
      part: the part of the step that it belongs to.
    """

    instruction: Instruction
    times: int
    seconds: float
    is_counted: bool
    part: Part


@dataclasses.dataclass(frozen=True)
class Timing:
    """The estimated time of a step.

    Attributes:
      instructions: of the entry, and of loops and calls, in the order they run; a fusion is one.
    """

    instructions: tuple[Timed, ...]

    @property
    def seconds(self) -> float:
        """The seconds of a step."""
        return sum(t.seconds for t in self.instructions)

    @property
    def counted_share(self) -> float:
        """The share of the time that stands in instructions which the compiler counted."""
        counted = sum(t.seconds for t in self.instructions if t.is_counted)
        return counted / self.seconds if self.seconds else 1.0

    def by_part(self) -> dict[Part, float]:
        """Return the seconds of each part, the longest first."""
        parts: dict[Part, float] = {}
        for timed in self.instructions:
            parts[timed.part] = parts.get(timed.part, 0.0) + timed.seconds
        return dict(sorted(parts.items(), key=lambda item: -item[1]))

    def seconds_each(self) -> dict[str, float]:
        """Return the seconds of an instruction, run once, by its name."""
        return {t.instruction.name: t.seconds / t.times for t in self.instructions}

    def slowest(self, count: int) -> list[Timed]:
        """Return the instructions that take the longest, those of all layers together as one."""
        alike: dict[object, Timed] = {}
        for t in self.instructions:
            place = re.sub(r"resblocks_\d+", "resblocks", t.instruction.op_name)
            key = (t.part, t.instruction.opcode, t.instruction.shapes, place)
            known = alike.get(key, t._replace(times=0, seconds=0.0))
            times, seconds = known.times + t.times, known.seconds + t.seconds
            alike[key] = known._replace(times=times, seconds=seconds)
        return sorted(alike.values(), key=lambda t: -t.seconds)[:count]


def uncounted_names(program: Program) -> frozenset[str]:
    """Return the names of the instructions that the compiler does not count, Pallas kernels say."""
    return frozenset(
        visit.instruction.name
        for visit in step_visits(program)
        if _takes_time(program, visit.instruction)
        and not _CYCLES.search(visit.instruction.attributes)
    )


def _takes_time(program: Program, line: Instruction) -> bool:
    """Return whether a core works on an instruction; exchanges between devices are apart."""
    return line.opcode not in FREE and not is_collective(program, line)


def time_step(
    program: Program, device_name: str, device: Device, kernel_cycles: Mapping[str, int]
) -> Timing:
    """Estimate the time of a TPU's program.

    A kernel takes its bundles, or as long as its arrays need to come from the device's memory and
    go there, whichever is more. What has neither a count nor a schedule takes the latter.

    Args:
      program: the compiled step.
      device_name: the name of the device in `hardware.DEVICES`.
      device: its bandwidths.
      kernel_cycles: of what the compiler does not count, from `bundles.read_kernel_cycles`.
    """
    clock = CLOCKS[device_name]
    twins = _twin_cycles(program, kernel_cycles)
    lines = {name: line for lines in program.computations.values() for name, line in lines.items()}
    timed = []
    for visit in step_visits(program):
        line = visit.instruction
        if not _takes_time(program, line):
            continue
        cycles = _CYCLES.search(line.attributes)
        moved = _memory_bytes(visit) / device.memory_bandwidth
        if cycles:
            seconds, is_counted = int(cycles.group(1)) / clock, True
        elif (bundles := kernel_cycles.get(line.name, twins.get(_twin_key(visit)))) is not None:
            seconds, is_counted = max(bundles / clock, moved), True
        else:
            seconds, is_counted = moved, False
        part = part_of(program, lines, line)
        timed.append(Timed(line, visit.times, visit.times * seconds, is_counted, part))
    return Timing(tuple(timed))


def _twin_cycles(program: Program, kernel_cycles: Mapping[str, int]) -> dict[object, int]:
    """Return the cycles of schedules by what they compute: the compiler makes alike ones once."""
    return {
        _twin_key(visit): kernel_cycles[visit.instruction.name]
        for visit in step_visits(program)
        if visit.instruction.name in kernel_cycles
    }


def _twin_key(visit: Visit) -> object:
    """Return what two instructions of one schedule have in common: name and shapes."""
    line = visit.instruction
    operands = [visit.computation[name] for name in line.operands]
    shapes = tuple((s.dtype, s.dims) for x in (line, *operands) for s in x.shapes)
    return line.opcode, line.name.rstrip("0123456789."), shapes


def _memory_bytes(visit: Visit) -> int:
    """Return the bytes that an instruction reads from and writes to the device's own memory."""
    operands = [visit.computation[name] for name in visit.instruction.operands]
    arrays = [shape for line in (visit.instruction, *operands) for shape in line.shapes]
    return sum(shape.bytes for shape in arrays if shape.memory_space == 0)
