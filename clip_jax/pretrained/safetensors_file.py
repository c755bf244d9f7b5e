"""The safetensors format to arrays that are read-only views of the file.

A file is eight bytes of length, that much JSON, and the numbers of all tensors without a gap.
The safetensors package (0.8.0) copies every tensor, reads bfloat16 only where ml_dtypes happens to
be imported, and takes the last of two tensors with one name. So the layout, a page long, is read
here; the package's rules (offsets that tile the buffer to its last byte, sizes equal to shape
times item) are kept, and duplicate names are refused besides.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from clip_jax.errors import UserError
from clip_jax.pretrained.mapped_file import BadFile, map_file, reading, shown

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
"""The format's names of items; those of eight and fewer bits beside integers are not read."""

FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
)
"""What a folder may hold, in the order in which it is looked for."""

# A tensor takes about a hundred bytes of JSON. Python's objects can take twenty times the text.
_MAX_JSON = 4 << 20
_MAX_RANK = 32
_SHARD = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a file, of all files an index names, or of a folder with one of the two.

    Raises:
      UserError: a file is missing, cut or damaged, or an index names a file outside its folder.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_in(path)
    with reading(path):
        file_U = map_file(path)
        if path.suffix == ".json":
            shards = _shards(file_U)
        else:
            return _arrays(file_U)
    arrays: dict[str, np.ndarray] = {}
    for shard, names in shards.items():
        found = read_safetensors(path.parent / shard)
        if found.keys() != names:
            odd = sorted(found.keys() ^ names)
            raise UserError(
                f"{path.parent / shard}: its tensors are not those that {path.name} lists for it"
                f" ({shown(odd[0])} and {len(odd) - 1} more); fetch both again"
            )
        arrays |= found
    return arrays


def _file_in(folder: Path) -> Path:
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: holds none of {', '.join(FOLDER_FILES)}; give the path of the file")


def _shards(file_U: np.ndarray) -> dict[str, set[str]]:
    """The names of tensors by the file that holds them; files stand in the index's own folder."""
    index = _json(file_U)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadFile("has no weight_map", "give the model.safetensors.index.json of a checkpoint")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise BadFile(
                f"names the file {shown(shard)}, which is no plain name in its folder",
                "put the files beside the index, and their plain names in it",
            )
        shards.setdefault(shard, set()).add(name)
    return shards


def _arrays(file_U: np.ndarray) -> dict[str, np.ndarray]:
    """The file's arrays, which must tile the bytes behind the header."""
    length = int.from_bytes(file_U[:8].tobytes(), "little")
    if len(file_U) < 8 or 8 + length > len(file_U):
        raise BadFile(
            f"declares a header of {length} bytes and has {len(file_U)} in all",
            "it is cut, damaged, or no safetensors file: fetch it again",
        )
    header = _json(file_U[8 : 8 + length])
    header.pop("__metadata__", None)
    data_U = file_U[8 + length :]
    arrays = {}
    end = 0
    checked = {name: _entry(name, value) for name, value in header.items()}
    for name, (dtype, shape, start, stop) in sorted(checked.items(), key=lambda item: item[1][2:]):
        if start != end:
            raise BadFile(f"the tensor {shown(name)} does not begin where the one before it ends")
        if stop > len(data_U):
            raise BadFile(
                f"the tensor {shown(name)} ends at byte {stop} and the file holds {len(data_U)}"
            )
        arrays[name] = data_U[start:stop].view(dtype).reshape(shape)
        end = stop
    if end != len(data_U):
        raise BadFile(f"has {len(data_U) - end} bytes behind its last tensor")
    return {name: arrays[name] for name in checked}


def _entry(name: str, value: Any) -> tuple[np.dtype, list[int], int, int]:
    """(item type, shape, first byte, byte after the last) of one tensor."""
    match value:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [start, stop]}:
            numbers = [*shape, start, stop]
        case _:
            raise BadFile(f"the header describes {shown(name)} by the wrong fields")
    if kind not in DTYPES:
        raise BadFile(f"the tensor {shown(name)} is of type {shown(kind)}", "save it as F32 or F16")
    if len(shape) > _MAX_RANK or any(type(n) is not int or not 0 <= n < 1 << 48 for n in numbers):
        raise BadFile(f"the shape or the place of {shown(name)} is not made of sizes")
    size = math.prod(shape) * DTYPES[kind].itemsize
    if stop - start != size or math.prod(max(n, 1) for n in shape) >= 1 << 48:
        raise BadFile(
            f"the tensor {shown(name)} of shape {shown(shape)} needs {size} bytes"
            f" and is given {stop - start}"
        )
    return DTYPES[kind], shape, start, stop


def _json(text_U: np.ndarray) -> dict[str, Any]:
    """A JSON object in which no name stands twice."""
    if len(text_U) > _MAX_JSON:
        raise BadFile(f"has {len(text_U)} bytes of JSON, more than any checkpoint needs")
    try:
        value = json.loads(text_U.tobytes().decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # not UTF-8, no JSON, a number too long
        raise BadFile(f"its JSON cannot be read ({shown(error)})") from None
    if not isinstance(value, dict):
        raise BadFile("its JSON is not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for name, value in pairs:
        if name in names:
            raise BadFile(f"its JSON holds the name {shown(name)} twice")
        names[name] = value
    return names
