"""Fill ragged token ids into the rectangular rows that a text tower reads, and read them back."""

from collections.abc import Sequence

import numpy as np

from clip_jax.errors import UserError


def fill_rows(
    rows: Sequence[list[int]], context_length: int, *, eot_id: int, pad_id: int
) -> np.ndarray:
    """Cut each row to `context_length - 1` ids, end it with `eot_id`, fill it up with `pad_id`.

    Returns:
      Token ids, int32 [B, context_length].

    Raises:
      UserError: no id would fit before the end token.
    """
    if context_length < 2:
        raise UserError(
            f"context_length is {context_length}: it must be at least 2 (one token, one end token)"
        )
    tokens_BL = np.full((len(rows), context_length), pad_id, np.int32)
    for row_L, ids in zip(tokens_BL, rows, strict=True):
        length = min(len(ids), context_length - 1)
        row_L[:length] = ids[:length]
        row_L[length] = eot_id
    return tokens_BL


def ids_before_end(row: Sequence[int] | np.ndarray, eot_id: int) -> list[int]:
    """Return the ids of a row up to its first end token; all of them where it has none."""
    ids = [int(i) for i in row]
    return ids[: ids.index(eot_id)] if eot_id in ids else ids
