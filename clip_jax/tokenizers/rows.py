"""Fill ragged token ids into the rectangular rows that a text tower reads, and read them back."""

import itertools
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
    lengths = np.minimum(np.array([len(ids) for ids in rows], np.int64), context_length - 1)
    filled_BL = np.arange(context_length) < lengths[:, None]
    # One list for all rows: an array made of each row's would take half of the tokenizer's time.
    flat = itertools.chain.from_iterable(ids[: context_length - 1] for ids in rows)
    tokens_BL[filled_BL] = np.fromiter(flat, np.int32, int(lengths.sum()))
    tokens_BL[np.arange(len(rows)), lengths] = eot_id
    return tokens_BL


def ids_before_end(row: Sequence[int] | np.ndarray, eot_id: int) -> list[int]:
    """Return the ids of a row up to its first end token; all of them where it has none."""
    ids = [int(i) for i in row]
    return ids[: ids.index(eot_id)] if eot_id in ids else ids
