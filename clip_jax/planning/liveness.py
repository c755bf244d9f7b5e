"""The temporaries that are alive at the peak of a scheduled program, from the order of its lines.

The compilers of devices that are not there do not give their assignment of buffers. The schedule
they give: an array is alive from the line that makes it to the last that reads it, or reads what
is only another name of it. What may be written over an operand is counted beside it at that line.
"""

import re
from typing import NamedTuple

from clip_jax.planning.hlo import Instruction, Program, Shape, called_computations

_SAME = ("bitcast", "opt-barrier", "add-dependency", "copy-done", "slice-done", "async-done")
_IN_PLACE = ("dynamic-update-slice", "scatter")


class Buffer(NamedTuple):
    """An array that an instruction makes.

    Attributes:
      name: the instruction.
      bytes: of the array, in the device's own memory.
    """

    name: str
    bytes: int


class Peak(NamedTuple):
    """Arrays that are alive together."""

    bytes: int
    buffers: tuple[Buffer, ...]


def live_at_peak(program: Program) -> Peak:
    """Return the temporaries of a program's entry that are alive at its peak; loops' own too."""
    return _peak(program, program.entry, {})


_Origins = list[frozenset[int]]


def _peak(program: Program, name: str, known: dict[str, Peak]) -> Peak:
    if name in known:
        return known[name]
    lines = list(program.computations[name].values())
    buffers: list[Buffer] = []
    made_at: list[int] = []
    last_use: list[int] = []
    origins: dict[str, _Origins] = {}
    inner: list[tuple[int, Peak]] = []
    for position, line in enumerate(lines):
        for ids in _reads(line, origins):
            for i in ids:
                last_use[i] = position
        if line.opcode == "while":
            inner += [(position, _peak(program, c, known)) for c in called_computations(line)]
        aliases = _aliases(program, program.computations[name], line, origins)
        results: _Origins = []
        for shape, alias in zip(line.shapes, aliases, strict=True):
            if alias is None:
                buffers.append(
                    Buffer(line.name, shape.padded_bytes if _is_stored(line, shape) else 0)
                )
                made_at.append(position)
                last_use.append(position)
                alias = frozenset({len(buffers) - 1})
            results.append(alias)
        origins[line.name] = results
    # What a computation returns is alive to its end, and belongs to what called it.
    outputs = {i for ids in origins.get(lines[-1].name, ()) for i in ids}
    known[name] = _highest(buffers, made_at, last_use, outputs, inner, len(lines))
    return known[name]


def _reads(line: Instruction, origins: dict[str, _Origins]) -> _Origins:
    """Return the buffers that an instruction reads; of a tuple, those of the element it takes."""
    if line.opcode == "get-tuple-element":
        elements = origins.get(line.operands[0], [])
        index = _index(line)
        return elements[index : index + 1] if len(elements) > index else elements
    if line.opcode in ("tuple", *_SAME):
        return []  # other names: what reads those keeps the arrays alive
    return [ids for operand in line.operands for ids in origins.get(operand, [])]


def _index(line: Instruction) -> int:
    match = re.search(r"index=(\d+)", line.attributes)
    return int(match.group(1)) if match else 0


def _is_stored(line: Instruction, shape: Shape) -> bool:
    """Return whether an array is a temporary in the device's own memory."""
    return shape.memory_space == 0 and line.opcode not in ("parameter", "constant", "iota")


def _highest(
    buffers: list[Buffer],
    made_at: list[int],
    last_use: list[int],
    outputs: set[int],
    inner: list[tuple[int, Peak]],
    length: int,
) -> Peak:
    changes = [0] * (length + 1)
    for i, buffer in enumerate(buffers):
        if i not in outputs:
            changes[made_at[i]] += buffer.bytes
            changes[last_use[i] + 1] -= buffer.bytes
    extra: dict[int, Peak] = {}
    for position, peak in inner:
        changes[position] += peak.bytes
        changes[position + 1] -= peak.bytes
        extra[position] = peak
    highest = most = total = 0
    for position in range(length):
        total += changes[position]
        if total > most:
            highest, most = position, total
    alive = [
        buffer
        for i, buffer in enumerate(buffers)
        if i not in outputs and buffer.bytes and made_at[i] <= highest <= last_use[i]
    ]
    return Peak(most, (*alive, *(extra[highest].buffers if highest in extra else ())))


def _aliases(
    program: Program,
    computation: dict[str, Instruction],
    line: Instruction,
    origins: dict[str, _Origins],
) -> list[frozenset[int] | None]:
    """Return, for each array of a result, the buffers that it is another name of; None is none."""
    first = origins.get(line.operands[0], []) if line.operands else []
    count = len(line.shapes)
    if line.opcode == "tuple":
        flat = [ids for operand in line.operands for ids in origins.get(operand, [])]
        return list(flat) if len(flat) == count else [None] * count
    if line.opcode == "get-tuple-element":
        index = _index(line)
        return [first[index]] if index < len(first) and count == 1 else [None] * count
    if line.opcode in ("while", *_SAME) and len(first) >= count:
        return list(first[:count])
    if line.opcode.endswith("-done") and first:
        # A start's result holds what goes in before what comes out, and a TPU's marks behind.
        shapes = computation[line.operands[0]].shapes
        data = [ids for shape, ids in zip(shapes, first, strict=True) if not shape.is_mark]
        return list(data[-count:]) if len(data) >= count else [None] * count
    if line.opcode in _IN_PLACE and first:
        return [first[0]]
    if line.opcode.endswith("-start"):
        # It holds what goes in beside what comes out; a sum is written over its terms.
        known = {
            shape: ids
            for operand in line.operands
            for shape, ids in zip(computation[operand].shapes, origins[operand], strict=True)
        }
        return [known.get(shape) for shape in line.shapes]
    if line.opcode == "fusion":
        return _fusion_aliases(program, line, origins)
    return [None] * count


def _fusion_aliases(
    program: Program, line: Instruction, origins: dict[str, _Origins]
) -> list[frozenset[int] | None]:
    """Return the operands that a fusion fills a part of, in place."""
    computation = program.computations[called_computations(line)[0]]
    lines = list(computation.values())
    root = lines[-1]
    results = [computation[n] for n in root.operands] if root.opcode == "tuple" else [root]
    if len(results) != len(line.shapes):
        return [None] * len(line.shapes)
    aliases: list[frozenset[int] | None] = []
    for result in results:
        while result.opcode in ("bitcast", "copy") and result.operands:
            result = computation[result.operands[0]]
        target = computation.get(result.operands[0]) if result.opcode in _IN_PLACE else None
        if target is not None and target.opcode == "parameter":
            number = int(target.attributes.split(",")[0].split("}")[0] or 0)
            source = origins.get(line.operands[number], [])
            aliases.append(source[0] if len(source) == 1 else None)
        else:
            aliases.append(None)
    return aliases
