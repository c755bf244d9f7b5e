"""A graph of ONNX operators while it is made: plain values, no package needed.

A value is an array, known now, or a `Tensor` that the graph computes. A dimension that JAX has
broadcast stays 1 in both until an operator needs its full length: ONNX broadcasts by itself. One
dimension, the batch, may be symbolic.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

OPSET = 18


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A value that the graph takes or computes.

    Attributes:
      name: its name in the graph.
      shape: its dimensions; 1 where it is broadcast later.
    """

    name: str
    shape: tuple[Any, ...]


Value = np.ndarray | Tensor


@dataclasses.dataclass(frozen=True)
class Operator:
    """A node: `onnx.helper.make_node`'s arguments."""

    kind: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any]


def is_static(shape: Iterable[Any]) -> bool:
    """Return whether every dimension is a number."""
    return all(isinstance(n, int | np.integer) for n in shape)


def sizes(shape: Iterable[Any]) -> np.ndarray:
    """Return a shape as Reshape reads it: the symbolic dimension is what is left, -1."""
    return np.array([n if isinstance(n, int | np.integer) else -1 for n in shape], np.int64)


def common_shape(shapes: Iterable[Sequence[Any]]) -> tuple[Any, ...]:
    """Return the shape that values are broadcast to."""
    reversed_shapes = [tuple(shape)[::-1] for shape in shapes]
    columns = itertools.zip_longest(*reversed_shapes, fillvalue=1)
    return tuple(next((n for n in column if n != 1), 1) for column in columns)[::-1]


class Graph:
    """Operators and constants, in the order in which they are computed.

    Attributes:
      batch: the input, whose first dimension is the batch.
      batch_dtype: of its values.
      operators: the nodes.
      constants: arrays by name.
    """

    def __init__(self, batch: Tensor, batch_dtype: Any) -> None:
        self.batch = batch
        self.batch_dtype = np.dtype(batch_dtype)
        self.operators: list[Operator] = []
        self.constants: dict[str, np.ndarray] = {}
        self._small: dict[Any, str] = {}

    def add(
        self, kind: str, inputs: Sequence[Value], shape: Sequence[Any], **attributes: Any
    ) -> Tensor:
        """Append an operator and return its output, whose shape is given."""
        output = f"{kind.lower()}_{len(self.operators)}"
        names = tuple(self.name(value) for value in inputs)
        self.operators.append(Operator(kind, names, output, attributes))
        return Tensor(output, tuple(shape))

    def name(self, value: Value) -> str:
        """Return a value's name; an array becomes a constant."""
        if isinstance(value, Tensor):
            return value.name
        key = (value.dtype.str, value.shape, value.tobytes()) if value.size <= 16 else None
        if key in self._small:
            return self._small[key]
        return self.constant(f"constant_{len(self.constants)}", value, key).name

    def constant(self, name: str, array: np.ndarray, key: Any = None) -> Tensor:
        """Store an array under a name and return it as a value that is not known now."""
        self.constants[name] = np.ascontiguousarray(array).reshape(array.shape)
        if key is not None:
            self._small[key] = name
        return Tensor(name, array.shape)

    def elementwise(self, kind: str, *values: Value) -> Tensor:
        """Append an operator that broadcasts."""
        return self.add(kind, values, common_shape(value.shape for value in values))

    def reshape(self, value: Value, shape: Sequence[Any]) -> Value:
        """Return a value of full shape in another shape."""
        shape = tuple(shape)
        if shape == value.shape:
            return value
        if isinstance(value, np.ndarray) and is_static(shape):
            return value.reshape(shape)
        return self.add("Reshape", (value, sizes(shape)), shape)

    def transpose(self, value: Value, order: Sequence[Any]) -> Value:
        """Return a value with its dimensions in another order."""
        order = [int(axis) for axis in order]
        if order == list(range(len(order))):
            return value
        if isinstance(value, np.ndarray):
            return value.transpose(order)
        return self.add("Transpose", (value,), [value.shape[axis] for axis in order], perm=order)

    def expand_dims(self, value: Value, axes: Sequence[Any]) -> Value:
        """Return a value with dimensions of 1 at these places of the result."""
        axes = [int(axis) for axis in axes]
        if not axes:
            return value
        if isinstance(value, np.ndarray):
            return np.expand_dims(value, tuple(axes))
        rest = iter(value.shape)
        shape = [1 if i in axes else next(rest) for i in range(len(value.shape) + len(axes))]
        return self.add("Unsqueeze", (value, np.array(axes, np.int64)), shape)

    def full(self, value: Value, shape: Sequence[Any]) -> Value:
        """Return a value with every dimension at its full length."""
        shape = tuple(shape)
        if value.shape == shape:
            return value
        if is_static(shape):
            if isinstance(value, np.ndarray):
                return np.broadcast_to(value, shape)
            return self.add("Expand", (value, sizes(shape)), shape)
        return self.add("Expand", (value, self._lengths(value.shape, shape)), shape)

    def _lengths(self, present: Sequence[Any], shape: Sequence[Any]) -> Value:
        """Return the lengths that Expand gives a value: 1 leaves one as it is."""
        lengths = [1 if a == b else b for a, b in zip(present, shape, strict=True)]
        if is_static(lengths):
            return np.array(lengths, np.int64)
        rows = self.add("Shape", (self.batch,), (1,), start=0, end=1)
        parts: list[Value] = [np.array([n], np.int64) if is_static([n]) else rows for n in lengths]
        return self.add("Concat", parts, (len(parts),), axis=0)
