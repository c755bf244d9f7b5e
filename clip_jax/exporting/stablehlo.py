"""Write a tower as a serialized `jax.export` program and a safetensors file of its arrays."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax import export
from safetensors.numpy import save_file

from clip_jax.exporting.check import largest_difference, metadata
from clip_jax.exporting.tower import TowerProgram

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def write_stablehlo(program: TowerProgram, folder: Path) -> dict[str, str]:
    """Write `TOWER.stablehlo` and `TOWER.safetensors`; return the metadata that the latter holds.

    The program is `call(arrays, batch)`. The arrays stand beside it, because a program that holds
    them could not be larger than 2 GB, and would be compiled with them.

    Raises:
      UserError: the program differs from the model by more than it may.
    """
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in program.arrays.items()}
    dimensions = export.symbolic_shape(", ".join(program.dimensions))
    batch = jax.ShapeDtypeStruct(dimensions, program.dtype)
    exported = export.export(jax.jit(program), platforms=PLATFORMS)(shapes, batch)
    serialized = exported.serialize()
    values = metadata(program, largest_difference(program, runner(serialized, program.arrays)))
    (folder / f"{program.tower}.stablehlo").write_bytes(serialized)
    save_file(dict(program.arrays), folder / f"{program.tower}.safetensors", values)
    return values


def runner(serialized: bytes | bytearray, arrays: Mapping[str, np.ndarray]):
    """Return the function from a batch to features that serialized bytes and arrays give."""
    call = export.deserialize(bytearray(serialized)).call
    on_device = jax.device_put(dict(arrays))
    return lambda batch: np.asarray(call(on_device, batch))
