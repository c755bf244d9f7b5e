"""Exact search: the nearest rows of memory-mapped parts, equal to brute force in every position.

A score is the inner product in float64 of a query with a row as it is stored; of equal scores
the row that comes first wins. BLAS in float32 only narrows down which rows are looked at: its
error is below `error_bound`, so no row of the answer is missed.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64

BLOCK_ROWS = 16_384


def brute_force_search(
    parts: Sequence[Float[np.ndarray, "_ D"]],
    query_QD: Float32[np.ndarray, "Q D"],
    k: int,
    *,
    block_rows: int = BLOCK_ROWS,
) -> tuple[Float64[np.ndarray, "Q k"], Int64[np.ndarray, "Q k"]]:
    """Return scores and row numbers of the `k` nearest rows, best first.

    They are fewer than `k` where there are fewer rows. `block_rows` are held in float32 at a time.

    >>> rows_BD = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float16)
    >>> scores_Qk, rows_Qk = brute_force_search([rows_BD], np.array([[0, 1]], np.float32), 2)
    >>> rows_Qk
    array([[1, 2]])
    """
    nearest = [(np.empty(0), np.empty(0, np.int64)) for _ in query_QD]
    part_start = 0
    for part in parts:
        for first in range(0, len(part), block_rows):
            block_BD = np.asarray(part[first : first + block_rows], np.float32)
            rough_QB = query_QD @ block_BD.T
            for i, query_D in enumerate(query_QD):
                scores, rows = nearest[i]
                candidates = _candidates(rough_QB[i], query_D, block_BD, scores, k)
                nearest[i] = top_k(
                    np.concatenate([scores, inner_products(block_BD[candidates], query_D)]),
                    np.concatenate([rows, candidates + (part_start + first)]),
                    k,
                )
        part_start += len(part)
    return np.stack([scores for scores, _ in nearest]), np.stack([rows for _, rows in nearest])


def inner_products(
    rows_BD: Float[np.ndarray, "B D"], query_D: Float32[np.ndarray, " D"]
) -> Float64[np.ndarray, " B"]:
    """Return the inner products in float64; a row's does not depend on the rows beside it."""
    # A matrix product would sum a row in another order at another position in the block.
    return (rows_BD.astype(np.float64) * query_D.astype(np.float64)).sum(axis=1)


def top_k(
    scores: Float64[np.ndarray, " B"], rows: Int64[np.ndarray, " B"], k: int
) -> tuple[Float64[np.ndarray, " k"], Int64[np.ndarray, " k"]]:
    """Return the `k` largest scores with their rows, in order; of equal scores the first rows."""
    order = np.lexsort((rows, -scores))[:k]
    return scores[order], rows[order]


def error_bound(rows_BD: np.ndarray, query_D: np.ndarray) -> float:
    """Return more than the error of any float32 inner product of these, in any order of summation.

    The bound is `D u / (1 - D u)` times `|x| |y|` with `u = 2^-24` (Higham 2002, section 3.1,
    with Cauchy-Schwarz); doubled for what the bound itself is rounded by.
    """
    largest = np.sqrt((rows_BD * rows_BD).sum(axis=1).max(initial=0.0))
    return float(2 * query_D.size * 2.0**-24 * largest * np.linalg.norm(query_D))


def _candidates(
    rough_B: np.ndarray, query_D: np.ndarray, block_BD: np.ndarray, scores: np.ndarray, k: int
) -> Int64[np.ndarray, " candidates"]:
    """Return the rows of a block that may be among the `k` best, given the best `scores` so far."""
    error = error_bound(block_BD, query_D)
    threshold = -np.inf
    if len(rough_B) > k:
        # k rows of the block score at least this, so a row below it by more than twice the error
        # is beaten by all of them.
        threshold = np.partition(rough_B, len(rough_B) - k)[len(rough_B) - k] - 2 * error
    if len(scores) >= k:
        threshold = max(threshold, scores[-1] - error)
    return np.flatnonzero(rough_B >= threshold)
