"""Ragged ids to the rectangular rows a text tower reads."""

from collections.abc import Sequence

import numpy as np

from clip_jax.errors import UserError


def fill_rows(
    rows: Sequence[list[int]], context_length: int, *, eot_id: int, pad_id: int
) -> np.ndarray:
    """Each row cut to `context_length - 1` ids, ended by `eot_id`, filled up with `pad_id`.

    Returns int32 [B, context_length]. Raises UserError when no id would fit before the end token.
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
