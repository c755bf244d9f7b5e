"""A roofline of a GPU's program: each kernel by its operations or bytes, whichever takes longer.

XLA's compiler for GPUs makes no estimate of time. This is none of a kernel either, but of what it
cannot be quicker than: it ranks programs of one device by what they compute and move.
"""

import math
import re
from collections.abc import Iterator

from clip_jax.planning.counts import convolution_flops, dot_flops, is_collective
from clip_jax.planning.cycles import FREE, Timed, Timing
from clip_jax.planning.hardware import Device
from clip_jax.planning.hlo import Instruction, Program, Visit, called_computations, step_visits
from clip_jax.planning.parts import part_of

_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_LABELS = re.compile(r"dim_labels=\w+_(\w+)->")


def time_by_roofline(program: Program, device: Device, utilization: float) -> Timing:
    """Return the time that a GPU's program takes at the least.

    Args:
      program: the compiled step.
      device: its published rates.
      utilization: the share of the peak that products are taken to reach.
    """
    lines = {name: line for lines in program.computations.values() for name, line in lines.items()}
    timed = []
    for visit in step_visits(program):
        line = visit.instruction
        if line.opcode in FREE or is_collective(program, line):
            continue
        seconds = sum(
            max(
                kernel_flops(kernel) / (utilization * device.peak(_dtype(kernel))),
                _moved_bytes(program, kernel) / device.memory_bandwidth,
            )
            for kernel in _kernels(program, visit)
        )
        part = part_of(program, lines, line)
        timed.append(Timed(line, visit.times, visit.times * seconds, False, part))
    return Timing(tuple(timed))


def roofline_flops(program: Program) -> int:
    """Count the operations of a GPU's program in products, convolutions and attention."""
    return sum(
        visit.times * kernel_flops(kernel)
        for visit in step_visits(program)
        for kernel in _kernels(program, visit)
    )


def _kernels(program: Program, visit: Visit) -> Iterator[Visit]:
    """Yield the kernels of an instruction: those of a library inside of a fusion, or itself."""
    inner = [
        Visit(line, program.computations[name], 1)
        for name in called_computations(visit.instruction)
        if visit.instruction.opcode == "fusion"
        for line in program.computations[name].values()
        if line.opcode in ("custom-call", "dot", "convolution")
    ]
    yield from inner or [visit]


def _operand(visit: Visit, index: int) -> Instruction:
    return visit.computation[visit.instruction.operands[index]]


def _dtype(visit: Visit) -> str:
    operands = visit.instruction.operands
    is_half = bool(operands) and _operand(visit, 0).shapes[0].dtype in ("bf16", "f16")
    return "bfloat16" if is_half else "float32"


def _moved_bytes(program: Program, visit: Visit) -> int:
    """Return the bytes that a kernel reads and writes; of what it cuts or fills, that part."""
    line = visit.instruction
    if line.opcode == "fusion":
        return sum(_fusion_bytes(program.computations[name]) for name in called_computations(line))
    read = sum(visit.computation[name].bytes for name in line.operands)
    # Libraries' workspaces are results too.
    return read + sum(s.bytes for s in line.shapes if s.dtype not in ("s8", "u8"))


def _fusion_bytes(computation: dict[str, Instruction]) -> int:
    lines = list(computation.values())
    moved = 0
    for line in lines:
        if line.opcode == "parameter":
            users = [x for x in lines if line.name in x.operands]
            if all(_takes_part(x, line.name) for x in users):
                moved += sum(x.bytes for x in users if "slice" in x.opcode and not _fills(x))
            else:
                moved += line.bytes
    root = lines[-1]
    results = [computation[n] for n in root.operands] if root.opcode == "tuple" else [root]
    return moved + sum(
        computation[line.operands[1]].bytes if _fills(line) else line.bytes for line in results
    )


def _fills(line: Instruction) -> bool:
    return line.opcode == "dynamic-update-slice"


def _takes_part(line: Instruction, name: str) -> bool:
    """Return whether an instruction reads a part of an operand, or writes over a part of it."""
    return line.opcode in ("dynamic-slice", "slice") or (_fills(line) and line.operands[0] == name)


def kernel_flops(visit: Visit) -> int:
    """Count the operations of one kernel's products, two a multiply-add; 0 where it has none."""
    line = visit.instruction
    if line.opcode == "dot":
        return dot_flops(visit)
    if line.opcode == "convolution":
        return convolution_flops(visit)
    target = _TARGET.search(line.attributes) if line.opcode == "custom-call" else None
    name = target.group(1) if target else ""
    if "gemm" in name or "matmul" in name:
        return _product_flops(visit)
    if "fmha" in name:
        return _attention_flops(visit, is_backward="Backward" in name)
    return _cudnn_flops(visit, name) if "conv" in name else 0


def _product_flops(visit: Visit) -> int:
    contracted = _CONTRACTED.search(visit.instruction.attributes)
    left = _operand(visit, 0).shapes[0].dims
    axes = re.findall(r"\d+", contracted.group(1)) if contracted else []
    return (
        2
        * math.prod(visit.instruction.shapes[0].dims)
        * math.prod(left[int(axis)] for axis in axes)
    )


def _attention_flops(visit: Visit, *, is_backward: bool) -> int:
    """Count two products of queries with keys; the backward kernel has five, one of them again."""
    query = visit.instruction.shapes[0].dims  # heads' outputs [B, N, L, D], or their gradients
    keys = math.prod(_operand(visit, 1).shapes[0].dims) * query[2] // math.prod(query)
    return (5 if is_backward else 2) * 2 * math.prod(query) * keys


def _cudnn_flops(visit: Visit, name: str) -> int:
    """Count a convolution or one of its gradients: the same products of outputs and kernel."""
    result, left, right = (
        visit.instruction.shapes[0].dims,
        *(_operand(visit, i).shapes[0].dims for i in (0, 1)),
    )
    labels = _LABELS.search(visit.instruction.attributes)
    if "BackwardFilter" in name:
        output, kernel = right, result
    elif "BackwardInput" in name:
        output, kernel = left, right
    else:
        output, kernel = result, right
    features = kernel[labels.group(1).index("o")] if labels else 1
    return 2 * math.prod(output) * math.prod(kernel) // features
