"""A device's memory by kind, from the buffers that are alive at its peak.

The CPU's compiler keeps a list of them; those of devices that are not there do not give theirs, and
the schedule tells (`liveness`). Each is the result of one instruction, and the scope of the
instruction says from which part of the step it comes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from clip_jax.planning.hlo import Instruction, Program, called_computations
from clip_jax.planning.liveness import live_at_peak
from clip_jax.planning.scopes import in_loss, step_scopes
from clip_jax.protobuf import Message, fields, varints
from clip_jax.training.state import TrainState, device_bytes
from clip_jax.training.step import TOWERS, UPDATE

STATE = ("parameters", "optimizer", "moving averages")
"""The kinds that the train state's arrays are of."""
TEMPORARIES = (
    "activations",
    "gradients",
    "copies of parameters",
    "embeddings",
    "loss",
    "update",
    "other temporaries",
)
"""The kinds that the program's temporary buffers are of."""


class Memory(NamedTuple):
    """Memory of one device at its peak, in bytes.

    Attributes:
      kinds: bytes by kind; they add up to the total.
      total: arguments, results that take no argument's place, and temporaries, as the compiler's
        memory analysis has them.
    """

    kinds: dict[str, int]
    total: int

    def sum_of(self, *kinds: str) -> int:
        """Return the bytes of some kinds together."""
        return sum(self.kinds.get(kind, 0) for kind in kinds)


class StepShapes(NamedTuple):
    """Dimensions that tell the arrays of one scope apart.

    Attributes:
      embed_dim: the features of the shared space.
      rows: the rows of the batch that a device's towers hold at once.
      whole: the dimensions of the parameters of rank 2 and more, each sorted.
      shards: the dimensions of one device's part of each parameter, each sorted.
    """

    embed_dim: int
    rows: int
    whole: frozenset[tuple[int, ...]]
    shards: frozenset[tuple[int, ...]]


def measure_memory(
    compiled: jax.stages.Compiled,
    program: Program,
    shapes: TrainState,
    *,
    embed_dim: int,
    rows: int,
) -> Memory:
    """Measure the memory of a compiled step.

    Args:
      compiled: the step.
      program: its parsed text.
      shapes: the layout of its state.
      embed_dim, rows: see `StepShapes`.
    """
    stats: Any = compiled.memory_analysis()
    kinds = {
        "parameters": device_bytes(shapes.params),
        "optimizer": device_bytes(shapes.opt_state),
        "moving averages": device_bytes(shapes.ema),
        "step, batch statistics": device_bytes((shapes.step, shapes.batch_stats)),
    }
    # Arrays that the step does not read, caption ids mostly, are no arguments of the program.
    kinds["batch"] = stats.argument_size_in_bytes - sum(kinds.values())
    kinds["metrics"] = stats.output_size_in_bytes - stats.alias_size_in_bytes
    step_shapes = shapes_of_step(shapes, embed_dim, rows)
    if stats.serialized_buffer_assignment_proto:
        kinds |= _temporaries(program, assigned_buffers(compiled, stats), stats, step_shapes)
    else:
        kinds |= _temporaries(program, scheduled_buffers(program, stats), stats, step_shapes)
    return Memory({k: size for k, size in kinds.items() if size}, sum(kinds.values()))


def assigned_buffers(compiled: jax.stages.Compiled, stats: Any) -> list[tuple[str, int]]:
    """Return (instruction, bytes) of what is alive at the peak in the compiler's assignment."""
    executable: Any = compiled.runtime_executable()
    module = executable.hlo_modules()[0].as_serialized_hlo_module_proto()
    return peak_buffers(stats.serialized_buffer_assignment_proto, instruction_names(module))


def scheduled_buffers(program: Program, stats: Any) -> list[tuple[str, int]]:
    """Return (instruction, bytes) of what is alive at the peak of the schedule.

    Their sum is not the compiler's to the byte: where it is more than all temporaries, each is
    taken in proportion.
    """
    peak = live_at_peak(program)
    share = min(1.0, stats.temp_size_in_bytes / max(peak.bytes, 1))
    return [(buffer.name, int(buffer.bytes * share)) for buffer in peak.buffers]


def _temporaries(
    program: Program, buffers: list[tuple[str, int]], stats: Any, step_shapes: StepShapes
) -> dict[str, int]:
    """Return the bytes of temporaries by kind, from the buffers that are alive at the peak."""
    kinds = dict.fromkeys(TEMPORARIES, 0)
    lines = {name: line for lines in program.computations.values() for name, line in lines.items()}
    for name, size in buffers:
        kinds[kind_of(program, lines, name, step_shapes)] += size
    # Constants, and the gaps between buffers of unlike sizes.
    kinds["other temporaries"] += stats.temp_size_in_bytes - sum(kinds.values())
    return kinds


def shapes_of_step(shapes: TrainState, embed_dim: int, rows: int) -> StepShapes:
    """Collect the dimensions of a state with this layout."""
    leaves = jax.tree.leaves(shapes.params)
    return StepShapes(
        embed_dim,
        rows,
        whole=frozenset(tuple(sorted(x.shape)) for x in leaves if x.ndim > 1),
        shards=frozenset(tuple(sorted(x.sharding.shard_shape(x.shape))) for x in leaves),
    )


def kind_of(program: Program, lines: dict[str, Instruction], name: str, shapes: StepShapes) -> str:
    """Return the kind of the buffer that an instruction's result lies in.

    The scope decides; only within the towers, and where the compiler names no scope, the largest
    array's dimensions do: XLA's loops carry what they keep under no name.
    """
    line = lines.get(name)
    if line is None:
        return "other temporaries"
    source = op_name(program, lines, line)
    scopes = step_scopes(source)
    dims = tuple(sorted(max(line.shapes, key=lambda s: s.bytes).dims)) if line.shapes else ()
    if in_loss(source):
        return "embeddings" if shapes.embed_dim in dims else "loss"
    if scopes == {UPDATE}:
        return "update"
    if "transpose(" in source and (dims in shapes.whole or dims in shapes.shards):
        return "gradients"
    if dims in shapes.whole:
        return "copies of parameters"
    has_rows = any(n and n % shapes.rows == 0 for n in dims)
    return "activations" if TOWERS in scopes or has_rows else "other temporaries"


def op_name(
    program: Program, lines: Mapping[str, Instruction], line: Instruction, depth: int = 4
) -> str:
    """Return an instruction's op_name, or where it has none that of what it calls or works on."""
    if line.op_name or not depth:
        return line.op_name
    for called in called_computations(line):
        for inner in reversed(program.computations[called].values()):
            if inner.op_name and inner.opcode != "parameter":
                return inner.op_name
    for operand in line.operands:
        if operand in lines and (name := op_name(program, lines, lines[operand], depth - 1)):
            return name
    return ""


def peak_buffers(assignment: bytes, names: dict[int, str]) -> list[tuple[str, int]]:
    """Return (instruction, bytes) of the temporaries that are alive at the peak of memory.

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
        message = by_number(value)
        if number == 1:
            defined_at = by_number(message.get(3, b""))
            buffers[message.get(1, 0)] = (names.get(defined_at.get(4, 0), ""), message.get(2, 0))
        elif number == 3:
            if any(message.get(flag) for flag in (3, 5, 7, 12)):
                skipped.add(message.get(1, 0))
        else:
            at_peak[message.get(1, 0)] = [n for _, _, v in fields(value, 2) for n in varints(v)]
    ids = [n for index, peak in at_peak.items() if index not in skipped for n in peak]
    return [buffers[n] for n in ids if n in buffers]


def instruction_names(module: bytes) -> dict[int, str]:
    """Return names by id.

    `module` is XLA's HloModuleProto: computations 3, instructions 2, name 1 and id 35.
    """
    names = {}
    for _, _, computation in fields(module, 3):
        for _, _, instruction in fields(computation, 2):
            message = by_number(instruction)
            names[message.get(35, 0)] = bytes(message.get(1, b"")).decode()
    return names


def by_number(message: Message) -> dict[int, Any]:
    """Return the fields of a message by number, of a repeated one the last."""
    return {number: value for number, _, value in fields(message)}
