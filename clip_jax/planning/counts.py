"""Operations and collectives of a compiled program, counted from its instructions."""

import math
import re
from typing import NamedTuple

from clip_jax.planning.hlo import Instruction, Program, Visit, visits

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


def matmul_flops(program: Program) -> int:
    """Operations of a device's matrix products and convolutions, two a multiply-add.

    Of a convolution the positions in its padding count, as `models.flops` counts them; the zeros
    that stand between strided values in a gradient do not.
    """
    total = 0
    for visit in visits(program):
        if visit.instruction.opcode == "dot":
            total += visit.times * _dot_flops(visit)
        elif visit.instruction.opcode == "convolution":
            total += visit.times * _convolution_flops(visit)
    return total


def _dot_flops(visit: Visit) -> int:
    left = visit.computation[visit.instruction.operands[0]].shapes[0].dims
    contracted = _numbers(visit.instruction, "lhs_contracting_dims")
    output = math.prod(visit.instruction.shapes[0].dims)
    return 2 * output * math.prod(left[axis] for axis in contracted)


def _convolution_flops(visit: Visit) -> int:
    """2 x output x (kernel positions x features in), less what input dilation fills with zeros."""
    instruction = visit.instruction
    kernel = visit.computation[instruction.operands[1]].shapes[0].dims
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
    dilation = re.search(r"lhs_dilate=([\dx]+)", instruction.attributes)
    output_features = kernel[labels.group(1).index("o")] if labels else 1
    zeros = math.prod(int(n) for n in dilation.group(1).split("x")) if dilation else 1
    output = math.prod(instruction.shapes[0].dims)
    return 2 * output * math.prod(kernel) // output_features // zeros


def _numbers(instruction: Instruction, key: str) -> list[int]:
    found = re.search(rf"\b{key}=\{{([\d,]*)\}}", instruction.attributes)
    return [int(n) for n in found.group(1).split(",") if n] if found else []


class Collective(NamedTuple):
    """One exchange between devices.

    Attributes:
      kind: of `COLLECTIVES`.
      bytes: of its result on one device; of what goes in, for a reduce-scatter.
      largest: bytes of its largest array: the compiler joins small ones into one exchange.
      group: devices that exchange with one another.
      stride: between the numbers of two neighbours in a group.
      times: how often a step runs it.
      instruction: the line itself.
    """

    kind: str
    bytes: int
    largest: int
    group: int
    stride: int
    times: int
    instruction: Instruction

    @property
    def wire_bytes(self) -> float:
        """What a device sends, once, by the algorithm that sends least (a ring)."""
        share = (self.group - 1) / self.group
        rounds = {"all-reduce": 2 * share, "collective-permute": 1.0}
        return self.bytes * rounds.get(self.kind, share)


def collectives(program: Program, devices: int) -> list[Collective]:
    """All exchanges between devices, in the order of the program."""
    found = []
    for visit in visits(program):
        kind = visit.instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            group, stride = replica_group(visit.instruction.attributes, devices)
            if group > 1:
                found.append(_collective(kind, visit, group, stride))
    return found


def _collective(kind: str, visit: Visit, group: int, stride: int) -> Collective:
    sizes = [shape.bytes for shape in visit.instruction.shapes]
    if kind == "reduce-scatter":
        sizes = [group * size for size in sizes]
    return Collective(kind, sum(sizes), max(sizes), group, stride, visit.times, visit.instruction)


def replica_group(attributes: str, devices: int) -> tuple[int, int]:
    """(devices in a group, distance of its neighbours' numbers) of a collective.

    XLA writes groups in three ways: as lists, as a reshaped and transposed count, and as axes of a
    mesh.
    """
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return devices, abs(int(pairs.group(2)) - int(pairs.group(1)))
    lists = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if lists:
        first = [int(n) for n in lists.group(1).split(",")]
        return len(first), first[1] - first[0] if len(first) > 1 else 1
    counted = re.search(
        r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    )
    if counted:
        return _counted_group(int(counted.group(1)), counted.group(2), counted.group(3))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
    if mesh:
        return _mesh_group(mesh.group(1), mesh.group(2))
    return devices, 1


def _counted_group(group: int, dims: str, order: str | None) -> tuple[int, int]:
    sizes = [int(n) for n in dims.split(",")]
    axes = [int(n) for n in order.split(",")] if order else list(range(len(sizes)))
    # Groups run along the axes that come last: the innermost that has more than one step.
    innermost = next((axis for axis in reversed(axes) if sizes[axis] > 1), axes[-1])
    return group, math.prod(sizes[innermost + 1 :])


def _mesh_group(axes: str, named: str) -> tuple[int, int]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    names = list(sizes)
    group, stride = 1, math.prod(sizes.values())
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named):
        size = int(part) if part else sizes[name]
        group *= size
        inside = math.prod(sizes[other] for other in names[names.index(name) + 1 :])
        # 'a':(2)4 is the part of 4 in axis a that comes after a part of 2.
        inside *= sizes[name] // (int(before) * int(part)) if part else 1
        stride = min(stride, inside) if size > 1 else stride
    return group, stride
