"""Read weights that an index divides among files: Hugging Face's `....index.json`."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.errors import UserError
from clip_jax.pretrained.mapped_file import BadFileError, map_file, reading, shown

# A tensor takes about a hundred bytes of JSON. Python's objects can take twenty times the text.
_MAX_JSON = 4 << 20


def read_shards(
    path: Path, ending: str, read: Callable[[Path], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return the tensors of all files that an index names.

    Args:
      path: the index.
      ending: of the files that it may name.
      read: reads one of them.

    Raises:
      UserError: a file is missing, cut or damaged, or an index names a file outside its folder.
    """
    with reading(path):
        shards = _shards(map_file(path), ending)
    arrays: dict[str, np.ndarray] = {}
    for shard, names in shards.items():
        tensors = read(path.parent / shard)
        if tensors.keys() != names:
            odd = sorted(tensors.keys() ^ names)
            raise UserError(
                f"{path.parent / shard}: its tensors are not those that {path.name} lists for it"
                f" ({shown(odd[0])} and {len(odd) - 1} more); fetch both again"
            )
        arrays |= tensors
    return arrays


def _shards(index_U: np.ndarray, ending: str) -> dict[str, set[str]]:
    """Return the names of tensors by the file that holds them, in the index's own folder."""
    weight_map = read_json_object(index_U).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadFileError("has no weight_map", "give the index of a checkpoint's weights")
    plain_name = re.compile(rf"[\w-][\w.-]*{re.escape(ending)}", re.ASCII)
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not plain_name.fullmatch(shard):
            raise BadFileError(
                f"names the file {shown(shard)}, which is no plain name in its folder",
                "put the files beside the index, and their plain names in it",
            )
        shards.setdefault(shard, set()).add(name)
    return shards


def read_json_object(text_U: np.ndarray) -> dict[str, Any]:
    """Return a JSON object in which no name stands twice."""
    if len(text_U) > _MAX_JSON:
        raise BadFileError(f"has {len(text_U)} bytes of JSON, more than any checkpoint needs")
    try:
        value = json.loads(text_U.tobytes().decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # not UTF-8, no JSON, a number too long
        raise BadFileError(f"its JSON cannot be read ({shown(error)})") from None
    if not isinstance(value, dict):
        raise BadFileError("its JSON is not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for name, value in pairs:
        if name in names:
            raise BadFileError(f"its JSON holds the name {shown(name)} twice")
        names[name] = value
    return names
