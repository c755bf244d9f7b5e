"""The ONNX form of each primitive of JAX that the towers are made of, as a table.

A form is called with the graph, the equation and its inputs, and returns the output. What depends
on no input of the program is computed now, by JAX, and becomes a constant.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from clip_jax.errors import UserError
from clip_jax.exporting.onnx_graph import Graph, Tensor, Value, common_shape, is_static

Form = Callable[..., Value]

INLINED = {
    "jit": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
"""Primitives that hold a program, by the parameter that it is."""


def convert(graph: Graph, program: ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
    """Append a program to a graph and return its outputs.

    Raises:
      UserError: a primitive has no form here.
    """
    jaxpr = program.jaxpr
    values: dict[Any, Value] = {
        var: np.asarray(x) for var, x in zip(jaxpr.constvars, program.consts, strict=True)
    }
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def read(var: Any) -> Value:
        if isinstance(var, Literal):
            aval: Any = var.aval
            return np.asarray(var.val, aval.dtype)
        return values[var]

    for eqn in jaxpr.eqns:
        values.update(
            zip(eqn.outvars, _outputs(graph, eqn, list(map(read, eqn.invars))), strict=True)
        )
    return [read(var) for var in jaxpr.outvars]


def _outputs(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    name = eqn.primitive.name
    if name in INLINED:
        return convert(graph, eqn.params[INLINED[name]], inputs)
    known = None if name in LAYOUTS else _known(eqn, inputs)
    if known is not None:
        return [known]
    if name not in FORMS:
        raise _unknown(name)
    return [FORMS[name](graph, eqn, *inputs)]


def _known(eqn: Any, inputs: list[Value]) -> np.ndarray | None:
    """Return the output where it can be computed now, else None."""
    arrays = [x for x in inputs if isinstance(x, np.ndarray)]
    if len(arrays) < len(inputs) or eqn.primitive.multiple_results:
        return None
    shapes = [var.aval.shape for var in eqn.invars]
    if eqn.primitive.name in ELEMENTWISE:
        shapes = [common_shape(x.shape for x in arrays)] * len(arrays)
    elif not all(map(is_static, (*shapes, *(var.aval.shape for var in eqn.outvars)))):
        return None
    arrays = [np.broadcast_to(x, shape) for x, shape in zip(arrays, shapes, strict=True)]
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(eqn.primitive.bind(*arrays, **eqn.params))


def _unknown(what: Any) -> UserError:
    return UserError(f"--format onnx has no form of JAX's {what}; give --format stablehlo")


def _shape(eqn: Any) -> tuple[Any, ...]:
    return eqn.outvars[0].aval.shape


def _full(graph: Graph, eqn: Any, *inputs: Value) -> list[Value]:
    """Return the inputs with every dimension at its full length."""
    pairs = zip(inputs, eqn.invars, strict=True)
    return [graph.full(value, var.aval.shape) for value, var in pairs]


def _operator(kind: str) -> Form:
    return lambda graph, eqn, *inputs: graph.elementwise(kind, *inputs)


def _same(graph: Graph, eqn: Any, x: Value) -> Value:
    return x


def _not_equal(graph: Graph, eqn: Any, x: Value, y: Value) -> Value:
    return graph.elementwise("Not", graph.elementwise("Equal", x, y))


def _square(graph: Graph, eqn: Any, x: Value) -> Value:
    return graph.elementwise("Mul", x, x)


def _integer_pow(graph: Graph, eqn: Any, x: Value) -> Value:
    return graph.elementwise("Pow", x, np.asarray(eqn.params["y"], eqn.outvars[0].aval.dtype))


def _rsqrt(graph: Graph, eqn: Any, x: Value) -> Value:
    return graph.elementwise("Reciprocal", graph.elementwise("Sqrt", x))


def _erfc(graph: Graph, eqn: Any, x: Value) -> Value:
    return graph.elementwise(
        "Sub", np.asarray(1, eqn.outvars[0].aval.dtype), graph.elementwise("Erf", x)
    )


def _select(graph: Graph, eqn: Any, which: Value, if_false: Value, if_true: Value) -> Value:
    return graph.elementwise("Where", which, if_true, if_false)


def _cast(graph: Graph, x: Value, dtype: Any) -> Tensor:
    return graph.add("Cast", (x,), x.shape, to=np.dtype(dtype))


def _convert(graph: Graph, eqn: Any, x: Value) -> Value:
    dtype = eqn.params["new_dtype"]
    return x if eqn.invars[0].aval.dtype == dtype else _cast(graph, x, dtype)


def _broadcast(graph: Graph, eqn: Any, x: Value, *dynamic: Value) -> Value:
    axes = set(map(int, eqn.params["broadcast_dimensions"]))
    return graph.expand_dims(x, [i for i in range(len(eqn.params["shape"])) if i not in axes])


def _reshape(graph: Graph, eqn: Any, x: Value) -> Value:
    (x,) = _full(graph, eqn, x)
    return graph.reshape(x, _shape(eqn))


def _transpose(graph: Graph, eqn: Any, x: Value) -> Value:
    return graph.transpose(x, eqn.params["permutation"])


def _reduce(kind: str) -> Form:
    def form(graph: Graph, eqn: Any, x: Value) -> Value:
        axes = np.array(eqn.params["axes"], np.int64)
        return graph.add(kind, (*_full(graph, eqn, x), axes), _shape(eqn), keepdims=0)

    return form


def _argmax(graph: Graph, eqn: Any, x: Value) -> Value:
    (x,) = _full(graph, eqn, x)
    if eqn.invars[0].aval.dtype == bool:
        x = _cast(graph, x, np.int32)
    (axis,) = eqn.params["axes"]
    index = graph.add("ArgMax", (x,), _shape(eqn), axis=int(axis), keepdims=0)
    return _cast(graph, index, eqn.params["index_dtype"])


def _concatenate(graph: Graph, eqn: Any, *inputs: Value) -> Value:
    axis = int(eqn.params["dimension"])
    return graph.add("Concat", _full(graph, eqn, *inputs), _shape(eqn), axis=axis)


def _stack(graph: Graph, eqn: Any, *inputs: Value) -> Value:
    axis = int(eqn.params["axis"])
    parts = [graph.expand_dims(x, [axis]) for x in _full(graph, eqn, *inputs)]
    return graph.add("Concat", parts, _shape(eqn), axis=axis)


def _cut(
    graph: Graph, x: Value, ranges: dict[int, tuple[Any, Any, int]], shape: Sequence[Any]
) -> Value:
    """Return a range of each of some axes: first, end and step."""
    if not ranges:
        return x
    columns = [*zip(*ranges.values(), strict=True)]
    firsts, ends, steps = (np.array(column, np.int64) for column in columns)
    axes = np.array(list(ranges), np.int64)
    return graph.add("Slice", (x, firsts, ends, axes, steps), shape)


def _slice(graph: Graph, eqn: Any, x: Value) -> Value:
    (x,) = _full(graph, eqn, x)
    p = eqn.params
    steps = p["strides"] or (1,) * len(x.shape)
    bounds = enumerate(zip(p["start_indices"], p["limit_indices"], steps, strict=True))
    ranges = {axis: bound for axis, bound in bounds if bound != (0, x.shape[axis], 1)}
    return _cut(graph, x, ranges, _shape(eqn))


def _pad(graph: Graph, eqn: Any, x: Value, value: Value) -> Value:
    (x, value) = _full(graph, eqn, x, value)
    config = [tuple(map(int, sides)) for sides in eqn.params["padding_config"]]
    if any(inside for _, _, inside in config):
        raise _unknown("padding between elements")
    sides = np.array([side for i in (0, 1) for side in (c[i] for c in config)], np.int64)
    return graph.add("Pad", (x, sides, value), _shape(eqn))


def _gather(graph: Graph, eqn: Any, x: Value, index: Value) -> Value:
    """Return rows of a table, a row of each sequence, or a range at a constant place."""
    x, index = _full(graph, eqn, x, index)
    numbers, slice_sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    axes, collapsed = numbers.start_index_map, numbers.collapsed_slice_dims
    if (
        numbers.operand_batching_dims == (0,)
        and axes == collapsed == (1,)
        and len(index.shape) == 3
    ):
        return graph.add("GatherND", (x, _cast(graph, index, np.int64)), _shape(eqn), batch_dims=1)
    if numbers.operand_batching_dims:
        raise _unknown(numbers)
    if isinstance(index, np.ndarray) and index.ndim == 1 and collapsed in ((), axes):
        firsts = [int(i) for i in index]
        ranges = {a: (i, i + slice_sizes[a], 1) for a, i in zip(axes, firsts, strict=True)}
        cut = [slice_sizes[i] for i in range(len(x.shape))]
        return graph.reshape(_cut(graph, x, ranges, cut), _shape(eqn))
    if axes != collapsed or any(slice_sizes[axis] != 1 for axis in axes):
        raise _unknown(numbers)
    rank = len(index.shape) - 1
    places = tuple(i for i in range(len(_shape(eqn))) if i not in numbers.offset_dims)
    if places != tuple(range(axes[0], axes[0] + rank)):
        raise _unknown(numbers)
    if len(axes) == 1:
        rows = graph.reshape(index, index.shape[:-1])
        return graph.add("Gather", (x, rows), _shape(eqn), axis=axes[0])
    return _gather_grid(graph, eqn, x, index)


def _gather_grid(graph: Graph, eqn: Any, x: Value, index: Value) -> Value:
    """Return what lies at some rows and some columns, which are constant."""
    numbers = eqn.params["dimension_numbers"]
    axes = numbers.start_index_map
    if not isinstance(index, np.ndarray) or index.ndim != len(axes) + 1:
        raise _unknown(numbers)
    lines = [np.unique(index[..., i]) for i in range(len(axes))]
    if not np.array_equal(np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1), index):
        raise _unknown(numbers)
    for axis, line in zip(axes, lines, strict=True):
        shape = [len(line) if i == axis else n for i, n in enumerate(x.shape)]
        x = graph.add("Gather", (x, line.astype(np.int64)), shape, axis=axis)
    return x


def _dot_general(graph: Graph, eqn: Any, x: Value, y: Value) -> Value:
    x, y = _full(graph, eqn, x, y)
    (sum_x, sum_y), (batch_x, batch_y) = eqn.params["dimension_numbers"]
    free_x = [i for i in range(len(x.shape)) if i not in (*sum_x, *batch_x)]
    free_y = [i for i in range(len(y.shape)) if i not in (*sum_y, *batch_y)]
    batch = [x.shape[i] for i in batch_x]
    summed = prod(x.shape[i] for i in sum_x)
    rows, columns = ([v.shape[i] for i in free] for v, free in ((x, free_x), (y, free_y)))
    x = graph.transpose(x, (*batch_x, *free_x, *sum_x))
    y = graph.transpose(y, (*batch_y, *sum_y, *free_y))
    # A matrix on the right multiplies rows in any number of dimensions.
    flat = rows if not batch and rows else [prod(rows)]
    x = graph.reshape(x, (*batch, *flat, summed))
    y = graph.reshape(y, (*batch, summed, prod(columns)))
    z = graph.add("MatMul", (x, y), (*batch, *flat, prod(columns)))
    return graph.reshape(z, _shape(eqn))


def _convolution(graph: Graph, eqn: Any, x: Value, kernel: Value) -> Value:
    p = eqn.params
    x, kernel = _full(graph, eqn, x, kernel)
    if set(p["lhs_dilation"]) != {1} or p["batch_group_count"] != 1:
        raise _unknown(f"convolution {p}")
    numbers = p["dimension_numbers"]
    x, kernel = graph.transpose(x, numbers.lhs_spec), graph.transpose(kernel, numbers.rhs_spec)
    out = [_shape(eqn)[i] for i in numbers.out_spec]
    y = graph.add(
        "Conv",
        (x, kernel),
        out,
        strides=list(p["window_strides"]),
        pads=[int(side) for i in (0, 1) for side in (pair[i] for pair in p["padding"])],
        dilations=list(p["rhs_dilation"]),
        group=p["feature_group_count"],
    )
    return graph.transpose(y, np.argsort(numbers.out_spec).tolist())


def _window_sum(graph: Graph, eqn: Any, x: Value) -> Value:
    """Return sums over windows of images [batch, height, width, channels]."""
    p = eqn.params
    window, strides, padding = p["window_dimensions"], p["window_strides"], p["padding"]
    dilated = {*p["base_dilation"], *p["window_dilation"]} != {1}
    if len(window) != 4 or window[0] != 1 or window[3] != 1 or dilated:
        raise _unknown(f"window {p}")
    (x,) = _full(graph, eqn, x)
    batch, height, width, channels = _shape(eqn)
    y = graph.add(
        "AveragePool",
        (graph.transpose(x, (0, 3, 1, 2)),),
        (batch, channels, height, width),
        kernel_shape=list(window[1:3]),
        strides=list(strides[1:3]),
        pads=[int(side) for i in (0, 1) for side in (pair[i] for pair in padding[1:3])],
        count_include_pad=1,
    )
    y = graph.elementwise("Mul", y, np.asarray(prod(window), eqn.outvars[0].aval.dtype))
    return graph.transpose(y, (0, 2, 3, 1))


ELEMENTWISE: dict[str, Form] = {
    "add": _operator("Add"),
    "sub": _operator("Sub"),
    "mul": _operator("Mul"),
    "div": _operator("Div"),
    "max": _operator("Max"),
    "min": _operator("Min"),
    "pow": _operator("Pow"),
    "neg": _operator("Neg"),
    "abs": _operator("Abs"),
    "exp": _operator("Exp"),
    "log": _operator("Log"),
    "sin": _operator("Sin"),
    "cos": _operator("Cos"),
    "tanh": _operator("Tanh"),
    "sqrt": _operator("Sqrt"),
    "logistic": _operator("Sigmoid"),
    "and": _operator("And"),
    "or": _operator("Or"),
    "not": _operator("Not"),
    "lt": _operator("Less"),
    "le": _operator("LessOrEqual"),
    "gt": _operator("Greater"),
    "ge": _operator("GreaterOrEqual"),
    "eq": _operator("Equal"),
    "ne": _not_equal,
    "square": _square,
    "integer_pow": _integer_pow,
    "rsqrt": _rsqrt,
    "erf": _operator("Erf"),
    "erfc": _erfc,
    "select_n": _select,
    "convert_element_type": _convert,
    "stop_gradient": _same,
    "copy": _same,
}
LAYOUTS: dict[str, Form] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _reshape,
    "transpose": _transpose,
}
FORMS: dict[str, Form] = {
    **ELEMENTWISE,
    **LAYOUTS,
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_max": _reduce("ReduceMax"),
    "argmax": _argmax,
    "concatenate": _concatenate,
    "stack": _stack,
    "slice": _slice,
    "pad": _pad,
    "gather": _gather,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "reduce_window_sum": _window_sum,
}
