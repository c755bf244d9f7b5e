"""Parser of a compiled program's text (`compiled.as_text()`, XLA's HLO).

A program is what every device runs: the shapes in it are one device's. Loops are followed with
their trip counts, which XLA's own cost analysis leaves out: it counts a loop's body once.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

ITEM_BYTES = {
    **dict.fromkeys(("pred", "s4", "u4", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
    **dict.fromkeys(("token", "opaque"), 0),
}


class Shape(NamedTuple):
    """One array of a program, as one device holds it.

    Attributes:
      dtype: as XLA writes it, "bf16" say.
      dims: its dimensions.
      memory_space: where it lies: 0 is the device's memory, 1 a TPU core's fast memory.
      layout: its axes from the innermost out, and the tiles of the innermost ones.
    """

    dtype: str
    dims: tuple[int, ...]
    memory_space: int = 0
    layout: str = ""

    @property
    def bytes(self) -> int:
        """The bytes of the array on one device."""
        return math.prod(self.dims) * ITEM_BYTES[self.dtype]

    @property
    def is_mark(self) -> bool:
        """Whether it is no data but a TPU's mark of a transfer that was started."""
        return self.dtype == "u32" and not self.dims

    @property
    def padded_bytes(self) -> int:
        """The bytes with its innermost axes filled up to whole tiles, as a TPU holds it."""
        tile = _TILE.search(self.layout)
        if not tile or not self.dims:
            return self.bytes
        dims, sizes = list(self.dims), [int(n) for n in tile.group(1).split(",")]
        inner = [int(n) for n in self.layout.partition(":")[0].split(",")]
        for axis, size in zip(inner, reversed(sizes), strict=False):
            dims[axis] = math.ceil(dims[axis] / size) * size
        return math.prod(dims) * ITEM_BYTES[self.dtype]


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
      name: the name by which other lines refer to it.
      opcode: "dot", "fusion", "all-reduce".
      shapes: the shapes of its result, several where that is a tuple.
      operands: the names of other instructions of the same computation.
      attributes: the rest of the line; of a constant and a parameter, its literal too.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def bytes(self) -> int:
        """The bytes of the result."""
        return sum(shape.bytes for shape in self.shapes)

    @property
    def op_name(self) -> str:
        """The path of scopes that it was traced in; empty where the compiler made it."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return match.group(1).replace("\\'", "'") if match else ""


class Program(NamedTuple):
    """All computations by name, each in the order it runs, and the name of the entry."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


class Visit(NamedTuple):
    """An instruction, the computation it stands in, and how often a step runs it."""

    instruction: Instruction
    computation: dict[str, Instruction]
    times: int


# "bf16[32,77,512]{2,1,0:T(8,128)(2,1)S(1)}": the layout ends in the memory space, if it is not 0.
_SHAPE = re.compile(
    r"\b([a-z]+[0-9]*(?:e\d+m\d+[a-z]*)?)\[([0-9,]*)\](?:\{([^}]*?)(?:S\((\d+)\))?\})?"
)
_TILE = re.compile(r"T\(([\d,]+)\)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = ")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')

# These run what they call once as a whole; `reduce` and its kin run theirs once an element, and no
# matrix product stands in those.
_CALLERS = ("fusion", "call", "while", "conditional", "async-start")


def parse_program(text: str) -> Program:
    """Parse a program's text into its computations."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _HEAD.match(line) if not line.startswith(" ") else None
        if head:
            current = computations.setdefault(head.group(2), {})
            entry = head.group(2) if head.group(1) else entry
        elif current is not None and (start := _LINE.match(line)):
            current[start.group(1)] = _instruction(start.group(1), line[start.end() :])
    return Program(computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
    shape_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shapes = tuple(
        Shape(dtype, tuple(int(n) for n in dims.split(",") if n), int(space or 0), layout)
        for dtype, dims, layout, space in _SHAPE.findall(rest[:shape_end])
    )
    opening = rest.index("(", shape_end)
    opcode = rest[shape_end:opening].strip()
    closing = _closing(rest, opening)
    operands = tuple(_OPERAND.findall(rest[opening:closing]))
    # A constant's value and a parameter's number stand, as operands do, between the brackets.
    literal = rest[opening + 1 : closing] if opcode in ("constant", "parameter") else ""
    return Instruction(name, opcode, shapes, operands, literal + rest[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    """Return the position of the bracket that closes the one at `opening`."""
    depth = 0
    for position in range(opening, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position
    raise ValueError(f"a bracket does not close in {text[:200]}")


def visits(program: Program) -> Iterator[Visit]:
    """Yield every instruction that a step runs, in loops, calls and fusions too."""
    yield from _visits(program, program.entry, 1)


def _visits(program: Program, name: str, times: int) -> Iterator[Visit]:
    computation = program.computations[name]
    for instruction in computation.values():
        yield Visit(instruction, computation, times)
        if instruction.opcode in _CALLERS:
            inner = times
            if instruction.opcode == "while":
                inner *= trip_count(program, instruction)
            for called in called_computations(instruction):
                yield from _visits(program, called, inner)


_SEQUENCES = ("call", "conditional", "while")


def step_visits(program: Program) -> Iterator[Visit]:
    """Yield what a step runs one after the other: loops and calls run out, a fusion as one."""
    yield from _step_visits(program, program.entry, 1)


def _step_visits(program: Program, name: str, times: int) -> Iterator[Visit]:
    computation = program.computations[name]
    for instruction in computation.values():
        if instruction.opcode not in _SEQUENCES:
            yield Visit(instruction, computation, times)
            continue
        is_loop = instruction.opcode == "while"
        inner = times * (trip_count(program, instruction) if is_loop else 1)
        for called in called_computations(instruction):
            yield from _step_visits(program, called, inner)


def called_computations(instruction: Instruction) -> list[str]:
    """Return the computations that an instruction runs as a whole; of a loop, its body."""
    branches = _BRANCHES.search(instruction.attributes)
    called = _CALLED.findall(instruction.attributes)
    return called + (_OPERAND.findall(branches.group(1)) if branches else [])


def trip_count(program: Program, loop: Instruction) -> int:
    """Return how often a loop runs.

    XLA annotates it on a loop with a counter, as `lax.scan` makes them; where it does not, the one
    whole number that the condition compares with is the count of a scan.

    Raises:
      ValueError: neither is there, as in a `lax.while_loop` that ends on the data.
    """
    known = _TRIPS.search(loop.attributes)
    if known:
        return int(known.group(1))
    condition = re.search(r"condition=%([\w.\-]+)", loop.attributes)
    numbers: list[int] = []
    if condition:
        for visit in _visits(program, condition.group(1), 1):
            value = re.match(r"\d+", visit.instruction.attributes)
            if visit.instruction.opcode == "constant" and value and not visit.instruction.operands:
                numbers.append(int(value.group()))
    if len(numbers) != 1:
        raise ValueError(f"the trip count of the loop {loop.name} is not known")
    return numbers[0]
