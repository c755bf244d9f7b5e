"""Hold matrices in int8: a quarter of the file, and every product still in float32."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

SCALE = ".scale"
"""Behind a matrix's path: what its whole numbers are multiplied with."""
MATRICES = ("kernel", "proj", "text_projection", "embedding")
HEADS = ("q_proj/kernel", "k_proj/kernel", "v_proj/kernel")
LARGEST = 127


def quantize(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return arrays whose matrices are int8, each with its scales under its path and `SCALE`.

    Vectors and positions stay float32. Each output of a product (of a table, each row) has a
    scale of its own, which takes its largest weight to 127.
    """
    out = {}
    for path, array in arrays.items():
        if array.ndim < 2 or path.rsplit("/", 1)[-1] not in MATRICES:
            out[path] = array
            continue
        largest = np.max(np.abs(array), axis=_summed_axes(path, array.ndim), keepdims=True)
        scale = np.where(largest == 0, 1, largest / LARGEST).astype(np.float32)
        out[path] = np.rint(array / scale).astype(np.int8)
        out[path + SCALE] = scale
    return out


def _summed_axes(path: str, ndim: int) -> tuple[int, ...]:
    """Return the axes of a matrix that share a scale."""
    if path.endswith("/embedding"):
        return (ndim - 1,)
    if path.endswith(HEADS):
        return (0,)  # [width, heads, head size]
    return tuple(range(ndim - 1))


def dequantize(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return float32 arrays of what `quantize` gave."""
    return {
        path: array.astype(jnp.float32) * arrays[path + SCALE] if path + SCALE in arrays else array
        for path, array in arrays.items()
        if not path.endswith(SCALE)
    }
