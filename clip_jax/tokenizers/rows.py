"""Fill ragged token ids into the rectangular rows that a text tower reads, and read them back."""

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from clip_jax.errors import UserError


def ids_to_bytes(ids: Iterable[int]) -> bytes:
    """Return token ids as int32s in memory."""
    return array("i", ids).tobytes()


def fill_rows(
    rows: Sequence[bytes], context_length: int, *, eot_id: int, pad_id: int
) -> np.ndarray:
    """Cut each row to `context_length - 1` ids, end it with `eot_id`, fill it up with `pad_id`.

    Rows are bytes because joining those does not let Python's lock go, as numpy does for as little
    as this: dear where many threads want it.

    Args:
      rows: as `ids_to_bytes` gives them, or joined of such.

    Returns:
      Token ids, int32 [B, context_length].

    Raises:
      UserError: no id would fit before the end token.
    """
    if context_length < 2:
        raise UserError(
            f"context_length is {context_length}: it must be at least 2 (one token, one end token)"
        )
    end, padding = ids_to_bytes([eot_id]), ids_to_bytes([pad_id]) * context_length
    length = len(padding)
    filled = bytearray().join((ids[: length - len(end)] + end + padding)[:length] for ids in rows)
    return np.frombuffer(filled, np.int32).reshape(len(rows), context_length)


def ids_before_end(row: Sequence[int] | np.ndarray, eot_id: int) -> list[int]:
    """Return the ids of a row up to its first end token; all of them where it has none."""
    ids = [int(i) for i in row]
    return ids[: ids.index(eot_id)] if eot_id in ids else ids
