"""Read the safetensors format as arrays that are read-only views of the file.

The safetensors package checks the header: that its tensors have the sizes of their shapes and lie
one behind the other up to the file's last byte. It would copy every tensor and read bfloat16 only
where ml_dtypes happens to be imported, so the arrays are made here. It takes the last of two
tensors with one name, so names that stand twice are refused here too.
"""

import math
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from clip_jax.pretrained.mapped_file import BadFileError, map_file, reading, shown
from clip_jax.pretrained.shard_index import read_json_object, read_shards

DTYPES = {
    "BOOL": np.dtype(np.bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
}
"""The types that are read, by the format's names: not those of 8 and fewer bits beside integers."""

_MAX_RANK = 32


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Return the tensors of a file, or of all files that a `.safetensors.index.json` names.

    Raises:
      UserError: a file is missing, cut or damaged, or an index names a file outside its folder.
    """
    path = Path(path)
    if path.suffix == ".json":
        return read_shards(path, ".safetensors", read_safetensors)
    with reading(path):
        return _arrays(path)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the file's arrays, in the order in which they lie there."""
    file_U = map_file(path)
    length = int.from_bytes(file_U[:8].tobytes(), "little")
    if 8 + length > len(file_U):
        raise BadFileError(
            f"declares a header of {length} bytes and has {len(file_U)} in all",
            "it is cut, damaged, or no safetensors file: fetch it again",
        )
    read_json_object(file_U[8 : 8 + length])  # which is small, and has no name twice
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_slice(name) for name in file.offset_keys()}
            headers = {name: (x.get_dtype(), x.get_shape()) for name, x in tensors.items()}
    except SafetensorError as error:
        raise BadFileError(shown(error)) from None
    arrays, stop = {}, 8 + length
    for name, (kind, shape) in headers.items():
        if kind not in DTYPES:
            raise BadFileError(
                f"the tensor {shown(name)} is of type {kind}", "save it as F32 or F16"
            )
        if len(shape) > _MAX_RANK or math.prod(max(n, 1) for n in shape) >= 1 << 48:
            raise BadFileError(f"the shape of {shown(name)} is not made of sizes")
        start, stop = stop, stop + math.prod(shape) * DTYPES[kind].itemsize
        arrays[name] = file_U[start:stop].view(DTYPES[kind]).reshape(shape)
    return arrays
