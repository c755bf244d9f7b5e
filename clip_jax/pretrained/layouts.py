"""From their arrays to ours and back: the layouts of `names`, as exact re-arrangements.

Nothing is computed here but a cast to float32, so a round trip gives the same bits.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from clip_jax.errors import UserError
from clip_jax.pretrained.names import IGNORED, Place, place

Shape = tuple[int, ...]
NAMED = 4  # keys that an error names before it counts the rest


class Layout(NamedTuple):
    """One layout, for an array that has `shape` on our side.

    Attributes:
      their_shape: what they make of our shape.
      to_ours, to_theirs: (array, our shape) -> array.
    """

    their_shape: Callable[[Shape], Shape]
    to_ours: Callable[[np.ndarray, Shape], np.ndarray]
    to_theirs: Callable[[np.ndarray, Shape], np.ndarray]


def aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An empty array at a multiple of 64 bytes, which JAX takes over on a CPU without copying."""
    size = math.prod(shape) * dtype.itemsize
    bytes_U = np.empty(size + 64, np.uint8)
    start = -bytes_U.ctypes.data % 64
    return bytes_U[start : start + size].view(dtype).reshape(shape)


def transposed(x: np.ndarray) -> np.ndarray:
    """A matrix's transpose in C order, copied in blocks that stay in the cache.

    A plain strided copy of a large matrix misses the cache at nearly every element: six times as
    slow at 4,096 x 1,024.
    """
    made = aligned(x.shape[::-1], x.dtype)
    rows, columns = 16, 1024
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            made[j : j + columns, i : i + rows] = x[i : i + rows, j : j + columns].T
    return made


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


def their_shape(shape: Shape, where: Place) -> Shape:
    """The shape of the whole array their file has for ours."""
    theirs = LAYOUTS[where.layout].their_shape(shape)
    return (theirs[0] * where.parts, *theirs[1:]) if where.parts > 1 else theirs


def without_ones(shape: Shape) -> Shape:
    """A shape without leading ones: positions as [1, L, D], scalars as [1]."""
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape


def check_keys(source: Mapping[str, np.ndarray], places: Mapping[str, Place], about: str) -> None:
    """Raises UserError where the file lacks a key, or has one that has no place in the model."""
    wanted = {where.key for where in places.values()}
    missing = sorted(wanted - source.keys())
    unexpected = sorted(k for k in source.keys() - wanted if not IGNORED.match(k))
    parts = [f"it lacks {_some(missing)}"] if missing else []
    parts += [f"it has no use for {_some(unexpected)}"] if unexpected else []
    if parts:
        raise UserError(f"{about}: " + "; ".join(parts))


def _some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(keys[:NAMED]) + more


def check_shapes(
    source: Mapping[str, np.ndarray],
    places: Mapping[str, Place],
    shapes: Mapping[str, Shape],
    about: str,
) -> None:
    """Raises UserError at the first array of another shape than the model's."""
    for path, where in places.items():
        found, wanted = source[where.key].shape, their_shape(shapes[path], where)
        if without_ones(found) != without_ones(wanted):
            raise UserError(
                f"{about}: {where.key} has the shape {list(found)} and the model takes "
                f"{list(wanted)}"
            )


def to_ours(
    source: Mapping[str, np.ndarray], shapes: Mapping[str, Shape], naming: str, about: str
) -> dict[str, Callable[[], np.ndarray]]:
    """For each of our paths, a function that reads and re-arranges its array, as float32.

    Functions, so that the arrays of a big file exist one at a time.

    Args:
      source: their arrays by their names; may be read lazily.
      shapes: our arrays' shapes by their paths.
      naming: a key of `names.NAMINGS`.
      about: how the error begins: the file and the model.

    Raises:
      UserError: keys are missing or unexpected, or a shape differs.
    """
    return _readers(source, shapes, {path: place(path, naming) for path in shapes}, about)


def own_arrays(
    source: Mapping[str, np.ndarray], shapes: Mapping[str, Shape], about: str
) -> dict[str, Callable[[], np.ndarray]]:
    """`to_ours` for a file under our own names.

    Raises:
      UserError: keys are missing or unexpected, or a shape differs.
    """
    return _readers(source, shapes, {path: Place(path, "same") for path in shapes}, about)


def _readers(
    source: Mapping[str, np.ndarray],
    shapes: Mapping[str, Shape],
    places: Mapping[str, Place],
    about: str,
) -> dict[str, Callable[[], np.ndarray]]:
    check_keys(source, places, about)
    check_shapes(source, places, shapes, about)

    def make(path: str, where: Place) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            shape = shapes[path]
            whole = np.asarray(source[where.key]).reshape(their_shape(shape, where))
            piece = np.split(whole, where.parts)[where.part] if where.parts > 1 else whole
            ours = LAYOUTS[where.layout].to_ours(piece, shape)
            return np.asarray(ours, np.float32, order="C")

        return read

    return {path: make(path, where) for path, where in places.items()}


def to_theirs(arrays: Mapping[str, np.ndarray], naming: str) -> dict[str, np.ndarray]:
    """Our arrays by path as theirs by name, float32.

    Raises:
      UserError: the naming has no place for an array.
    """
    pieces: dict[str, dict[int, np.ndarray]] = {}
    for path, array in arrays.items():
        where = place(path, naming)
        theirs = LAYOUTS[where.layout].to_theirs(np.asarray(array, np.float32), array.shape)
        pieces.setdefault(where.key, {})[where.part] = theirs
    return {
        # Not `ascontiguousarray`, which makes a scalar a vector.
        key: np.asarray(
            np.concatenate([parts[i] for i in sorted(parts)]) if len(parts) > 1 else parts[0],
            order="C",
        )
        for key, parts in pieces.items()
    }
