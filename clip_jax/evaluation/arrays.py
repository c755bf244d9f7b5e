"""Read the `.npy` members of evaluated images: several labels, or groups."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from clip_jax.data.shards import BadSampleError, ConcatShards, Handles, Shard
from clip_jax.errors import UserError


def read_arrays(
    shards: Sequence[Shard], row_B: Int64[np.ndarray, " B"], what: str
) -> Int64[np.ndarray, "B K"]:
    """Return the array of each of these samples, a row of whole numbers of one length.

    Args:
      row_B: positions in the order of the data.
      what: the arrays, for messages.

    Raises:
      UserError: a sample has none, or one of another length or kind.
    """
    samples = ConcatShards(shards)
    rows: list[np.ndarray] = []
    with Handles() as handles:
        for row in row_B.tolist():
            shard, i = samples.at(row)
            read = getattr(shard, "array", None)
            try:
                array = None if read is None else read(i, handles)
            except BadSampleError as e:
                raise UserError(f"{shard.name}/{shard.key(i)}: no {what} ({e})") from None
            if array is None or array.ndim > 1 or array.dtype.kind not in "biuf":
                raise UserError(f"{shard.name}/{shard.key(i)} has no {what}: no .npy with a row")
            rows.append(np.atleast_1d(array))
            if len(rows[-1]) != len(rows[0]):
                raise UserError(
                    f"{shard.name}/{shard.key(i)} has {len(rows[-1])} {what}, and the first "
                    f"image has {len(rows[0])}"
                )
    return np.stack(rows).astype(np.int64)
