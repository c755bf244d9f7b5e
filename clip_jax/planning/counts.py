"""Counts of a compiled program's matrix operations and collectives."""

import math
import re
from typing import Any, NamedTuple

import numpy as np

from clip_jax.planning.hlo import Instruction, Program, Visit, visits

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
            total += visit.times * _dot_flops(visit)
        elif visit.instruction.opcode == "convolution":
            total += visit.times * _convolution_flops(visit)
    return total


def _dot_flops(visit: Visit) -> int:
    left = visit.computation[visit.instruction.operands[0]].shapes[0].dims
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", visit.instruction.attributes)
    axes = _numbers(contracted.group(1)) if contracted else ()
    output = math.prod(visit.instruction.shapes[0].dims)
    return 2 * output * math.prod(left[axis] for axis in axes)


def _convolution_flops(visit: Visit) -> int:
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
    """

    kind: str
    bytes: int
    largest: int
    group: tuple[int, ...]
    times: int
    instruction: Instruction

    @property
    def wire_bytes(self) -> float:
        """The bytes a device sends each time, by the algorithm that sends least (a ring)."""
        share = (len(self.group) - 1) / len(self.group)
        factors = {"all-reduce": 2 * share, "collective-permute": 1.0}
        return self.bytes * factors.get(self.kind, share)


def find_collectives(program: Program, devices: int) -> list[Collective]:
    """Return all exchanges between devices, in the order of the program."""
    collectives = []
    for visit in visits(program):
        kind = visit.instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            group = replica_group(visit.instruction.attributes, devices)
            if len(group) > 1:
                collectives.append(_collective(kind, visit, group))
    return collectives


def _collective(kind: str, visit: Visit, group: tuple[int, ...]) -> Collective:
    sizes = [shape.bytes for shape in visit.instruction.shapes]
    if kind == "reduce-scatter":
        sizes = [len(group) * size for size in sizes]
    return Collective(kind, sum(sizes), max(sizes), group, visit.times, visit.instruction)


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
