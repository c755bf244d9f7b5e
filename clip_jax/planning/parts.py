"""Which part of a step an instruction belongs to: its tower, its pass and what it computes."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from clip_jax.planning.hlo import Instruction, Program, called_computations
from clip_jax.planning.memory import op_name
from clip_jax.planning.scopes import step_scopes
from clip_jax.training.step import LOSS, UPDATE

PARTS = (
    "attention",
    "projections",
    "MLP",
    "norms",
    "convolutions",
    "embedding",
    "loss",
    "update",
    "copies",
    "collectives",
    "other",
)
"""What an instruction can compute. "copies" compute nothing: they move arrays, or change their
layout or dtype; "embedding" is what comes before a tower's first block."""


class Part(NamedTuple):
    """A part of the step.

    Attributes:
      tower: "image", "text", or "" outside of both.
      direction: "forward" or "backward"; "" outside of both towers.
      name: one of `PARTS`.
    """

    tower: str
    direction: str
    name: str


_TOWERS = (
    ("image", re.compile(r"/visual/|encode_image")),
    ("text", re.compile(r"/text/|encode_text")),
)
# The first that is in the path of scopes decides. A path names modules from the outside in.
_BY_SCOPE = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        (
            "projections",
            r"/(?:[qkv]+_proj|out_proj|attnpool/c_proj|proj|visual/dot_general|text\._project)\b",
        ),
        ("MLP", r"/(?:mlp|c_fc|c_proj)\b"),
        ("attention", r"/(?:attn|attend|attn_pool|attnpool)\b"),
        ("embedding", r"_embed\b|embedding"),
        ("norms", r"/(?:ln_\w+|ln|bn\d*|downsample_1)\b|LayerNorm|BatchNorm"),
        ("convolutions", r"/(?:conv\d+|downsample_0)\b"),
    )
)
_MOVING = frozenset(
    (
        "bitcast",
        "bitcast-convert",
        "broadcast",
        "concatenate",
        "constant",
        "convert",
        "copy",
        "copy-done",
        "copy-start",
        "dynamic-slice",
        "dynamic-update-slice",
        "get-tuple-element",
        "iota",
        "pad",
        "parameter",
        "reshape",
        "slice",
        "slice-done",
        "slice-start",
        "transpose",
        "tuple",
    )
)


def part_of(program: Program, lines: Mapping[str, Instruction], line: Instruction) -> Part:
    """Return the part of the step that an instruction belongs to.

    Args:
      program: the compiled step.
      lines: its instructions by name.
      line: a fusion as a whole, or what stands alone.
    """
    path = _path(program, lines, line)
    tower = next((name for name, scope in _TOWERS if scope.search(path)), "")
    direction = ""
    if tower:
        direction = "backward" if "transpose(" in path else "forward"
    return Part(tower, direction, _name(program, line, path))


def _path(program: Program, lines: Mapping[str, Instruction], line: Instruction) -> str:
    """Return the path of scopes that decides: of a fusion with a matrix product, the product's."""
    if line.opcode == "fusion":
        for name in called_computations(line):
            for inner in program.computations[name].values():
                if inner.opcode in ("convolution", "dot") and inner.op_name:
                    return inner.op_name
    return op_name(program, lines, line)


def _name(program: Program, line: Instruction, path: str) -> str:
    scopes = step_scopes(path)
    if scopes == {LOSS}:
        return "loss"
    if is_copy(program, line):
        return "copies"
    # Outside of the scopes stand the gradient's norm and the guard around the new state.
    if UPDATE in scopes or (path.startswith("jit(step)/") and not scopes):
        return "update"
    return next((name for name, scope in _BY_SCOPE if scope.search(path)), "other")


def is_copy(program: Program, instruction: Instruction) -> bool:
    """Return whether an instruction moves arrays and computes nothing."""
    if instruction.opcode != "fusion":
        return instruction.opcode in _MOVING and instruction.opcode != "broadcast"
    return all(
        inner.opcode in _MOVING or (inner.opcode == "fusion" and is_copy(program, inner))
        for name in called_computations(instruction)
        for inner in program.computations[name].values()
    )
