"""A device's memory by kind, from the compiler's own assignment of buffers.

The compiler keeps one list of what is in memory at once when most is. Each buffer of that list is
the result of one instruction, and the instruction's name says from which part of the step it comes.
"""

from typing import Any, NamedTuple

import jax

from clip_jax.planning.hlo import Instruction, Program, called_computations
from clip_jax.protobuf import Message, fields, varints
from clip_jax.training.state import TrainState, device_bytes

TEMPORARIES = (
    "activations",
    "gradients",
    "copies of parameters",
    "embeddings",
    "loss",
    "other temporaries",
)


class Memory(NamedTuple):
    """Bytes of one device.

    Attributes:
      kinds: by kind; they add up to the total.
      total: arguments, results that take no argument's place, and temporaries, as the compiler's
        memory analysis has them.
    """

    kinds: dict[str, int]
    total: int


class Origin(NamedTuple):
    """What tells the parts of a step apart.

    Attributes:
      embed_dim: features of the shared space.
      rows: of the batch that a device's towers hold at once.
      whole, split: the dimensions of the parameters, sorted; as they are and as one device's part.
    """

    embed_dim: int
    rows: int
    whole: frozenset[tuple[int, ...]]
    split: frozenset[tuple[int, ...]]


def measure_memory(
    compiled: jax.stages.Compiled,
    program: Program,
    shapes: TrainState,
    *,
    embed_dim: int,
    rows: int,
) -> Memory:
    """The memory of a compiled step; for the arguments after `program` see `Origin`."""
    stats: Any = compiled.memory_analysis()
    kinds = {
        "parameters": device_bytes(shapes.params),
        "optimiser": device_bytes(shapes.opt_state),
        "moving averages": device_bytes(shapes.ema),
        "step, batch statistics": device_bytes((shapes.step, shapes.batch_stats)),
    }
    # Arrays that the step does not read, captions' numbers mostly, are no arguments of the program.
    kinds["batch"] = stats.argument_size_in_bytes - sum(kinds.values())
    kinds["metrics"] = stats.output_size_in_bytes - stats.alias_size_in_bytes
    kinds |= dict.fromkeys(TEMPORARIES, 0)
    origin = step_origin(shapes, embed_dim, rows)
    executable: Any = compiled.runtime_executable()
    module = executable.hlo_modules()[0].as_serialized_hlo_module_proto()
    peak = peak_buffers(stats.serialized_buffer_assignment_proto, instruction_names(module))
    lines = {name: line for lines in program.computations.values() for name, line in lines.items()}
    for name, size in peak:
        kinds[kind_of(program, lines, name, origin)] += size
    # Constants, and the gaps between buffers of unlike sizes.
    kinds["other temporaries"] += stats.temp_size_in_bytes - sum(kinds[k] for k in TEMPORARIES)
    return Memory({k: size for k, size in kinds.items() if size}, sum(kinds.values()))


def step_origin(shapes: TrainState, embed_dim: int, rows: int) -> Origin:
    """Of a state with this layout."""
    leaves = jax.tree.leaves(shapes.params)
    large = [x for x in leaves if x.ndim > 1]
    return Origin(
        embed_dim,
        rows,
        frozenset(tuple(sorted(x.shape)) for x in large),
        frozenset(tuple(sorted(x.sharding.shard_shape(x.shape))) for x in leaves),
    )


def kind_of(program: Program, lines: dict[str, Instruction], name: str, origin: Origin) -> str:
    """The kind of the buffer that an instruction's result lies in."""
    line = lines.get(name)
    if line is None:
        return "other temporaries"
    came_from = op_name(program, lines, line)
    dims = tuple(sorted(max(line.shapes, key=lambda s: s.bytes).dims)) if line.shapes else ()
    if "shard_map" in came_from:
        return "embeddings" if origin.embed_dim in dims else "loss"
    if "transpose(" in came_from and (dims in origin.whole or dims in origin.split):
        return "gradients"
    if dims in origin.whole:
        return "copies of parameters"
    # What a loop keeps of its passes has no name; it has the batch's rows among its dimensions.
    of_rows = any(n and n % origin.rows == 0 for n in dims)
    return "activations" if "CLIP" in came_from or of_rows else "other temporaries"


def op_name(
    program: Program, lines: dict[str, Instruction], line: Instruction, depth: int = 4
) -> str:
    """Where an instruction comes from; where it does not say, what it calls or works on does."""
    if line.op_name or not depth:
        return line.op_name
    for called in called_computations(line):
        for inner in reversed(program.computations[called].values()):
            if inner.op_name and inner.opcode != "parameter":
                return inner.op_name
    for operand in line.operands:
        if operand in lines and (found := op_name(program, lines, lines[operand], depth - 1)):
            return found
    return ""


def peak_buffers(assignment: bytes, names: dict[int, str]) -> list[tuple[str, int]]:
    """(instruction, bytes) of the temporaries that are in memory at once when most is.

    `assignment` is XLA's BufferAssignmentProto (xla/service/hlo.proto): logical_buffers 1 with
    id 1, size 2 and defined_at 3 (instruction_id 4); buffer_allocations 3 with index 1,
    is_thread_local 3, is_entry_computation_parameter 5, maybe_live_out 7 and is_constant 12; the
    buffers at each allocation's peak 5 with its index 1 and their ids 2.
    """
    buffers: dict[int, tuple[str, int]] = {}
    skipped: set[int] = set()
    at_peak: dict[int, list[int]] = {}
    for number, _, value in fields(assignment):
        if number not in (1, 3, 5):
            continue
        first = by_number(value)
        if number == 1:
            defined = by_number(first.get(3, b""))
            buffers[first.get(1, 0)] = (names.get(defined.get(4, 0), ""), first.get(2, 0))
        elif number == 3:
            if any(first.get(flag) for flag in (3, 5, 7, 12)):
                skipped.add(first.get(1, 0))
        else:
            at_peak[first.get(1, 0)] = [n for _, _, v in fields(value, 2) for n in varints(v)]
    ids = [n for index, peak in at_peak.items() if index not in skipped for n in peak]
    return [buffers[n] for n in ids if n in buffers]


def instruction_names(module: bytes) -> dict[int, str]:
    """Names by id, of XLA's HloModuleProto: computations 3, instructions 2, name 1, id 35."""
    names = {}
    for _, _, computation in fields(module, 3):
        for _, _, instruction in fields(computation, 2):
            found = by_number(instruction)
            names[found.get(35, 0)] = bytes(found.get(1, b"")).decode()
    return names


def by_number(message: Message) -> dict[int, Any]:
    """The fields of a message, of a repeated one the last."""
    return {number: value for number, _, value in fields(message)}
