"""Counts of a compiled program's matrix operations and collectives."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from clip_jax.planning.hlo import (
    Instruction,
    Program,
    Visit,
    called_computations,
    step_visits,
    visits,
)

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


def matmul_flops(program: Program) -> int:
    """Count one device's operations in matrix products and convolutions, two a multiply-add.

    Of a convolution the positions in its padding count, as `models.flops` counts them; the zeros
    that stand between strided values in a gradient do not.
    """
    total = 0
    for visit in visits(program):
        if visit.instruction.opcode == "dot":
            total += visit.times * dot_flops(visit)
        elif visit.instruction.opcode == "convolution":
            total += visit.times * convolution_flops(visit)
    return total


def dot_flops(visit: Visit) -> int:
    """Count 2 x output x contracted features."""
    left = visit.computation[visit.instruction.operands[0]].shapes[0].dims
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", visit.instruction.attributes)
    axes = _numbers(contracted.group(1)) if contracted else ()
    output = math.prod(visit.instruction.shapes[0].dims)
    return 2 * output * math.prod(left[axis] for axis in axes)


def convolution_flops(visit: Visit) -> int:
    """Count 2 x output x (kernel positions x features in), less the zeros of input dilation."""
    instruction = visit.instruction
    kernel = visit.computation[instruction.operands[1]].shapes[0].dims
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
    dilation = re.search(r"lhs_dilate=([\dx]+)", instruction.attributes)
    output_features = kernel[labels.group(1).index("o")] if labels else 1
    zeros = math.prod(int(n) for n in dilation.group(1).split("x")) if dilation else 1
    output = math.prod(instruction.shapes[0].dims)
    return 2 * output * math.prod(kernel) // output_features // zeros


class Collective(NamedTuple):
    """One exchange between devices.

    Attributes:
      kind: one of `COLLECTIVES`.
      bytes: the bytes of its result on one device; of what goes in, for a reduce-scatter.
      largest: the bytes of its largest array: the compiler joins small ones into one exchange.
      group: the numbers of the devices that exchange with device 0.
      times: how often a step runs it.
      instruction: the line itself.
      beside: the names of the instructions that the schedule runs between its start and its end;
        none where the device waits for it.
    """

    kind: str
    bytes: int
    largest: int
    group: tuple[int, ...]
    times: int
    instruction: Instruction
    beside: tuple[str, ...] = ()

    @property
    def wire_bytes(self) -> float:
        """The bytes a device sends each time, by the algorithm that sends least (a ring)."""
        share = (len(self.group) - 1) / len(self.group)
        factors = {"all-reduce": 2 * share, "collective-permute": 1.0}
        return self.bytes * factors.get(self.kind, share)


def find_collectives(program: Program, devices: int) -> list[Collective]:
    """Return all exchanges between devices, in the order of the program."""
    collectives = []
    for visit in step_visits(program):
        for line in exchanges(program, visit.instruction):
            group = replica_group(line.attributes, devices)
            if len(group) > 1:
                collectives.append(_collective(line, visit.times, group, _beside(program, visit)))
    return collectives


# A TPU's compiler spreads a collective over the fusions that run beside it, each of which holds it
# once more; only its start counts.
_CARRIER = "async_collective_fusion"
# A sum and the cut of a device's part of it, as one fusion: a reduce-scatter.
_FUSED = "all-reduce-scatter"
_START, _DONE = 'custom_call_target="AsyncCollectiveStart"', "AsyncCollectiveDone"


def _inner(program: Program, line: Instruction) -> Iterator[Instruction]:
    """Yield the instructions of what a line calls; a sum that is cut is of the opcode `_FUSED`."""
    for name in called_computations(line):
        for inner in program.computations[name].values():
            is_cut = name.startswith(_FUSED) and inner.opcode == "all-reduce"
            yield inner._replace(opcode=_FUSED) if is_cut else inner
            if inner.opcode in ("fusion", "async-start", "call"):
                yield from _inner(program, inner)


def _kind(line: Instruction) -> str | None:
    if line.opcode == _FUSED:
        return "reduce-scatter"
    kind = line.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def exchanges(program: Program, line: Instruction) -> list[Instruction]:
    """Return the exchanges that an instruction is or begins, a fusion's and another core's too."""
    if _kind(line):
        return [line]
    if line.opcode not in ("fusion", "async-start", "call-start"):
        return []
    if any(name.startswith(_CARRIER) for name in called_computations(line)):
        return []
    inner = list(_inner(program, line))
    if any(_DONE in x.attributes for x in inner):
        return []
    return [x for x in inner if _kind(x)]


def is_collective(program: Program, line: Instruction) -> bool:
    """Return whether an instruction is an exchange, or its start or end, and computes nothing."""
    if line.opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
        return True
    if line.opcode != "fusion":
        return False
    if any(name.startswith(_FUSED) for name in called_computations(line)):
        return True
    return any(
        x.opcode == "custom-call" and (_START in x.attributes or _DONE in x.attributes)
        for x in _inner(program, line)
    )


def _beside(program: Program, visit: Visit) -> tuple[str, ...]:
    """Return the names of what stands between the start of an exchange and its end."""
    end = _end(program, visit)
    if end is None:
        return ()
    names = list(visit.computation)
    between = names[names.index(visit.instruction.name) + 1 : names.index(end)]
    return tuple(n for n in between if _computes(visit.computation[n]))


_COMPUTING = ("fusion", "custom-call", "dot", "convolution", "reduce", "while", "call")
# What a core runs before another core begins an exchange for it.
_PREPARES = 'custom_call_target="PrepareAsyncCall'


def _computes(line: Instruction) -> bool:
    return line.opcode in _COMPUTING and _PREPARES not in line.attributes


def _end(program: Program, visit: Visit) -> str | None:
    """Return the name of the instruction that waits for what this one starts, if there is one."""
    start, lines = visit.instruction, visit.computation
    if start.opcode.endswith("-start"):
        waits = (x for x in lines.values() if start.name in x.operands)
        return next((x.name for x in waits if x.opcode.endswith("-done")), None)
    started = exchanges(program, start)
    if start.opcode != "fusion" or not is_collective(program, start) or not started:
        return None
    # The first end behind it of an exchange that was traced in the same place.
    behind = list(lines.values())[list(lines).index(start.name) + 1 :]
    for line in behind:
        is_same = line.opcode == "fusion" and line.op_name == started[0].op_name
        if is_same and is_collective(program, line):
            return line.name
    return None


def _collective(
    line: Instruction, times: int, group: tuple[int, ...], beside: tuple[str, ...]
) -> Collective:
    kind = _kind(line)
    assert kind
    shapes = line.shapes
    if line.opcode in ("all-gather-start", "reduce-scatter-start", "all-to-all-start"):
        # What goes in, then what comes out, then a TPU's marks of what is under way.
        shapes = tuple(shape for shape in shapes if not shape.is_mark)
        shapes = shapes[len(shapes) // 2 :]
    elif line.opcode == "collective-permute-start":
        shapes = shapes[1:2]
    sizes = [shape.bytes for shape in shapes]
    if kind == "reduce-scatter" and line.opcode != _FUSED:
        sizes = [len(group) * size for size in sizes]
    return Collective(kind, sum(sizes), max(sizes), group, times, line, beside)


_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


def replica_group(attributes: str, devices: int) -> tuple[int, ...]:
    """Return the first group of a collective: the numbers of its devices.

    XLA writes groups in four ways: as lists, as sources and targets, as an iota that is reshaped
    and transposed, and as axes of a mesh.
    """
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return _numbers(pairs.group(1)) + _numbers(pairs.group(2))
    if lists := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return _numbers(lists.group(1))
    if iota := re.search(rf"replica_groups=\[\d+,(\d+)\]<={_IOTA}", attributes):
        ids = _iota(iota.group(2), iota.group(3))
        return tuple(ids.reshape(-1, int(iota.group(1)))[0].tolist())
    if mesh := re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))?\s*\{{([^}}]*)\}}",
        attributes,
    ):
        axes, dims, permutation, named = mesh.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
        ids = _iota(dims or str(math.prod(sizes.values())), permutation)
        return _along_axes(ids, sizes, named)
    return tuple(range(devices))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    """Return 0, 1, 2, ... in this shape, its axes permuted."""
    ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids.transpose(_numbers(permutation)) if permutation else ids


def _along_axes(ids: np.ndarray, sizes: dict[str, int], named: str) -> tuple[int, ...]:
    """Return the devices along the named axes of a mesh, from its first device on.

    'a':(2)4 names that part of axis a which has 4 steps, below a part with 2.
    """
    parts = {
        name: (int(before or 1), int(part or sizes[name]))
        for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named)
    }
    shape: list[int] = []
    index: list[Any] = []
    for name, size in sizes.items():
        before, part = parts.get(name, (size, 1))
        shape += [before, part, size // before // part]
        index += [0, slice(None), 0]
    return tuple(ids.reshape(shape)[tuple(index)].ravel().tolist())
