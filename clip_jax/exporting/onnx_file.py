"""Write a tower as an ONNX file, run by onnxruntime beside the model."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from clip_jax.distribution import install_command
from clip_jax.errors import UserError
from clip_jax.exporting.check import CAPTIONS, largest_difference, metadata, sample_images
from clip_jax.exporting.onnx_graph import OPSET, Graph, Tensor
from clip_jax.exporting.onnx_primitives import convert
from clip_jax.exporting.tower import TowerProgram

IR_VERSION = 9  # that of ONNX 1.14, 2023, which has the operators of `OPSET`
INPUTS = {"image": "pixels", "text": "tokens"}
OUTPUT = "features"
ONE_FILE = 1_500_000_000
"""Bytes of weights above which they stand beside the file: a message has 2 GB at most."""
ROWS, TIMES = 8, 5
"""The batch that is timed, and how often."""


def import_onnx() -> tuple[Any, Any]:
    """Return onnx and onnxruntime.

    Raises:
      UserError: one of them is not installed.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(f"--format onnx needs {error.name}: {install_command('onnx')}") from None
    return onnx, onnxruntime


def write_onnx(program: TowerProgram, folder: Path) -> dict[str, str]:
    """Write `TOWER.onnx`; return the metadata that it holds.

    Weights of more than `ONE_FILE` bytes stand in `TOWER.onnx.data`.

    Raises:
      UserError: the program differs from the model by more than it may, has a primitive without an
        ONNX form, or onnx or onnxruntime is not installed.
    """
    onnx, onnxruntime = import_onnx()
    shape = export.symbolic_shape(", ".join(program.dimensions))
    batch = jax.ShapeDtypeStruct(shape, program.dtype)
    graph, output = make_graph(program, program.arrays, INPUTS[program.tower], batch)
    model = make_message(onnx, graph, output)
    is_large = sum(x.nbytes for x in graph.constants.values()) > ONE_FILE
    del graph
    path = folder / f"{program.tower}.onnx"
    onnx.save_model(model, path, save_as_external_data=is_large, location=f"{path.name}.data")
    run = runner(onnxruntime, path)
    values = metadata(program, largest_difference(program, run))
    onnx.helper.set_model_props(model, values)
    path.write_bytes(model.SerializeToString())  # the weights beside it stay as they are
    return values | time_rows(program, run)


def make_graph(
    function: Callable[..., Any],
    arrays: Mapping[str, np.ndarray],
    name: str,
    batch: jax.ShapeDtypeStruct,
) -> tuple[Graph, Tensor]:
    """Return a function of arrays and a batch as operators, and their output.

    What is held in int8 stays so, and the graph multiplies it out.

    Args:
      name: of the input.
      batch: its shape, whose first dimension may be symbolic.

    Raises:
      UserError: a primitive has no ONNX form.
    """
    graph = Graph(Tensor(name, batch.shape), batch.dtype)
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in arrays.items()}
    traced = jax.make_jaxpr(function)(shapes, batch)
    values = [
        graph.constant(path, array) if array.dtype == np.int8 else np.asarray(array)
        for path, array in sorted(arrays.items())  # as JAX orders a dict
    ]
    (output,) = convert(graph, traced, [*values, graph.batch])
    return graph, graph.add("Identity", (output,), traced.out_avals[0].shape)


def make_message(onnx: Any, graph: Graph, output: Tensor) -> Any:
    """Return a graph whose output is float32 as ONNX's message."""
    helper = onnx.helper

    def type_number(dtype: Any) -> int:
        return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def value_info(tensor: Tensor, dtype: Any) -> Any:
        shape = [n if isinstance(n, int) else str(n) for n in tensor.shape]
        return helper.make_tensor_value_info(tensor.name, type_number(dtype), shape)

    nodes = [
        helper.make_node(
            operator.kind,
            operator.inputs,
            [operator.output],
            **{
                key: type_number(value) if isinstance(value, np.dtype) else value
                for key, value in operator.attributes.items()
            },
        )
        for operator in graph.operators
    ]
    nodes[-1].output[0] = OUTPUT
    message = helper.make_graph(
        nodes,
        "clip_jax",
        [value_info(graph.batch, graph.batch_dtype)],
        [value_info(dataclasses.replace(output, name=OUTPUT), np.float32)],
        [onnx.numpy_helper.from_array(x, name) for name, x in graph.constants.items()],
    )
    return helper.make_model(
        message,
        producer_name="clip_jax",
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET)],
    )


def runner(onnxruntime: Any, path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from a batch to features that a file holds, on CPUs."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (value.name for value in session.get_inputs())
    return lambda batch: session.run(None, {name: batch})[0]


def time_rows(program: TowerProgram, run: Callable[[np.ndarray], np.ndarray]) -> dict[str, str]:
    """Return the milliseconds that a batch takes by onnxruntime on CPUs and by the model.

    They take turns, five times; each is the shortest, which other work delays least.
    """
    clip = program.clip
    if program.tower == "text":
        batch = np.resize(clip.tokenize(CAPTIONS), (ROWS, clip.config.text.context_length))
        own: Callable[[Any], jax.Array] = clip.encode_text
    else:
        images = np.asarray(clip.preprocess(next(iter(sample_images()))))
        batch = np.resize(images, (ROWS, *images.shape[1:]))
        own = clip.encode_image
    calls = {"onnxruntime_ms": run, "model_ms": lambda batch: np.asarray(own(batch))}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(TIMES + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call(batch)
            if turn:  # the first one compiles
                seconds[name].append(time.perf_counter() - start)
    shortest = {name: f"{1000 * min(times):.1f}" for name, times in seconds.items()}
    return {"timed_rows": str(ROWS), **shortest, "model_device": jax.default_backend()}
