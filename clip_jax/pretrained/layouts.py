"""Re-arrange a file's arrays into those of the parameter tree and back, by the tables of `names`.

Nothing is computed here but a cast to float32, so a round trip gives the same bits.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from clip_jax.errors import UserError
from clip_jax.pretrained.names import IGNORED, Place, find_place

Shape = tuple[int, ...]
MAX_NAMED = 4  # keys that an error names before it counts the rest


class Layout(NamedTuple):
    """One way of laying out an array that has `shape` in the parameter tree.

    Attributes:
      file_shape: from the tree's shape to the file's.
      from_file, to_file: (array, the tree's shape) -> array.
    """

    file_shape: Callable[[Shape], Shape]
    from_file: Callable[[np.ndarray, Shape], np.ndarray]
    to_file: Callable[[np.ndarray, Shape], np.ndarray]


def empty_aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Return an empty array at a multiple of 64 bytes, which JAX on a CPU need not copy."""
    size = math.prod(shape) * dtype.itemsize
    bytes_U = np.empty(size + 64, np.uint8)
    start = -bytes_U.ctypes.data % 64
    return bytes_U[start : start + size].view(dtype).reshape(shape)


def transposed(x: np.ndarray) -> np.ndarray:
    """Return a matrix's transpose in C order, copied in blocks that stay in the cache.

    A plain strided copy of a large matrix misses the cache at nearly every element: six times as
    slow at 4,096 x 1,024.
    """
    out = empty_aligned(x.shape[::-1], x.dtype)
    rows, columns = 16, 1024
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            out[j : j + columns, i : i + rows] = x[i : i + rows, j : j + columns].T
    return out


LAYOUTS: dict[str, Layout] = {
    "same": Layout(lambda s: s, lambda x, s: x, lambda x, s: x),
    # torch.nn.Linear keeps [out, in].
    "linear": Layout(lambda s: s[::-1], lambda x, s: transposed(x), lambda x, s: transposed(x)),
    # OIHW to HWIO.
    "conv": Layout(
        lambda s: (s[3], s[2], s[0], s[1]),
        lambda x, s: x.transpose(2, 3, 1, 0),
        lambda x, s: x.transpose(3, 2, 0, 1),
    ),
    # [out, height * width * in] to HWIO.
    "patches": Layout(
        lambda s: (s[3], math.prod(s[:3])),
        lambda x, s: transposed(x).reshape(s),
        lambda x, s: transposed(x.reshape(-1, s[3])),
    ),
    # [out, in, 1, 1] to [in, out].
    "pointwise": Layout(
        lambda s: (s[1], s[0], 1, 1),
        lambda x, s: x[:, :, 0, 0].T,
        lambda x, s: x.T[:, :, None, None],
    ),
    "gain": Layout(
        lambda s: (s[0], 1, 1), lambda x, s: x.reshape(s), lambda x, s: x.reshape(-1, 1, 1)
    ),
    # [heads * size, in] to [in, heads, size].
    "heads": Layout(
        lambda s: (s[1] * s[2], s[0]),
        lambda x, s: transposed(x).reshape(s),
        lambda x, s: transposed(x.reshape(s[0], -1)),
    ),
    "heads_bias": Layout(
        lambda s: (math.prod(s),), lambda x, s: x.reshape(s), lambda x, s: x.reshape(-1)
    ),
    # [out, heads * size] to [heads, size, out].
    "heads_out": Layout(
        lambda s: (s[2], s[0] * s[1]),
        lambda x, s: transposed(x).reshape(s),
        lambda x, s: transposed(x.reshape(-1, s[2])),
    ),
}


def file_shape(shape: Shape, place: Place) -> Shape:
    """Return the shape of the whole array in the file, from that of the tree's array."""
    whole = LAYOUTS[place.layout].file_shape(shape)
    return (whole[0] * place.parts, *whole[1:]) if place.parts > 1 else whole


def without_leading_ones(shape: Shape) -> Shape:
    """Return a shape without leading ones; some files hold [1, L, D] positions, [1] scalars."""
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape


def check_keys(source: Mapping[str, np.ndarray], places: Mapping[str, Place], where: str) -> None:
    """Raise UserError if the file lacks a key, or has one that has no place in the model."""
    wanted = {place.key for place in places.values()}
    missing = sorted(wanted - source.keys())
    unexpected = sorted(k for k in source.keys() - wanted if not IGNORED.match(k))
    parts = [f"it lacks {_first_of(missing)}"] if missing else []
    parts += [f"it has no use for {_first_of(unexpected)}"] if unexpected else []
    if parts:
        raise UserError(f"{where}: " + "; ".join(parts))


def _first_of(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - MAX_NAMED} more" if len(keys) > MAX_NAMED else ""
    return ", ".join(keys[:MAX_NAMED]) + more


def check_shapes(
    source: Mapping[str, np.ndarray],
    places: Mapping[str, Place],
    shapes: Mapping[str, Shape],
    where: str,
) -> None:
    """Raise UserError at the first array of another shape than the model's."""
    for path, place in places.items():
        given, wanted = source[place.key].shape, file_shape(shapes[path], place)
        if without_leading_ones(given) != without_leading_ones(wanted):
            raise UserError(
                f"{where}: {place.key} has the shape {list(given)} and the model takes "
                f"{list(wanted)}"
            )


def has_arrays(source: Mapping[str, np.ndarray], shapes: Mapping[str, Shape], naming: str) -> bool:
    """Return whether a file's arrays are those of a model, by their names and shapes."""
    try:
        places = {path: find_place(path, naming) for path in shapes}
        check_keys(source, places, "")
        check_shapes(source, places, shapes, "")
    except UserError:
        return False
    return True


def import_arrays(
    source: Mapping[str, np.ndarray], shapes: Mapping[str, Shape], naming: str, where: str
) -> dict[str, Callable[[], np.ndarray]]:
    """Return, for each path of the tree, a function that reads and re-arranges its array, float32.

    Functions, so that the arrays of a big file exist one at a time.

    Args:
      source: the file's arrays by its names; may be read lazily.
      shapes: the shapes of the tree's arrays by their paths.
      naming: a key of `names.NAMINGS`.
      where: how the error begins: the file and the model.

    Raises:
      UserError: keys are missing or unexpected, or a shape differs.
    """
    places = {path: find_place(path, naming) for path in shapes}
    check_keys(source, places, where)
    check_shapes(source, places, shapes, where)

    def make_reader(path: str, place: Place) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            shape = shapes[path]
            whole = np.asarray(source[place.key]).reshape(file_shape(shape, place))
            piece = np.split(whole, place.parts)[place.part] if place.parts > 1 else whole
            return np.asarray(LAYOUTS[place.layout].from_file(piece, shape), np.float32, order="C")

        return read

    return {path: make_reader(path, place) for path, place in places.items()}


def export_arrays(arrays: Mapping[str, np.ndarray], naming: str) -> dict[str, np.ndarray]:
    """Return the tree's arrays by path as a file's by name, float32.

    Raises:
      UserError: the naming has no place for an array.
    """
    pieces: dict[str, dict[int, np.ndarray]] = {}
    for path, array in arrays.items():
        place = find_place(path, naming)
        piece = LAYOUTS[place.layout].to_file(np.asarray(array, np.float32), array.shape)
        pieces.setdefault(place.key, {})[place.part] = piece
    return {
        # Not `ascontiguousarray`, which makes a scalar a vector.
        key: np.asarray(
            np.concatenate([parts[i] for i in sorted(parts)]) if len(parts) > 1 else parts[0],
            order="C",
        )
        for key, parts in pieces.items()
    }
