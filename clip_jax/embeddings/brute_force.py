"""Exact search: the nearest rows of memory-mapped parts, equal to brute force in every place.

A score is the inner product in float64 of a query with a row as it is stored; of equal scores
the row that comes first wins. BLAS in float32 only narrows down which rows are looked at: it
errs by less than `slack`, so no row of the answer is missed.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64

BLOCK_ROWS = 16_384


def search_exact(
    parts: Sequence[Float[np.ndarray, "_ D"]], query_QD: Float32[np.ndarray, "Q D"], k: int
) -> tuple[Float64[np.ndarray, "Q k"], Int64[np.ndarray, "Q k"]]:
    """Scores and numbers of the `k` nearest rows, best first; fewer where there are fewer rows."""
    found = [(np.empty(0), np.empty(0, np.int64)) for _ in query_QD]
    start = 0
    for part in parts:
        for first in range(0, len(part), BLOCK_ROWS):
            block_BD = np.asarray(part[first : first + BLOCK_ROWS], np.float32)
            rough_QB = query_QD @ block_BD.T
            for i, query_D in enumerate(query_QD):
                near = _near(rough_QB[i], query_D, block_BD, found[i][0], k)
                scores = scores_of(block_BD[near], query_D)
                found[i] = best(
                    np.concatenate([found[i][0], scores]),
                    np.concatenate([found[i][1], near + (start + first)]),
                    k,
                )
        start += len(part)
    return np.stack([scores for scores, _ in found]), np.stack([rows for _, rows in found])


def scores_of(
    rows_BD: Float[np.ndarray, "B D"], query_D: Float32[np.ndarray, " D"]
) -> Float64[np.ndarray, " B"]:
    """The inner products in float64; a row's does not depend on the rows beside it."""
    # A matrix product would sum a row in another order at another place of the block.
    return (rows_BD.astype(np.float64) * query_D.astype(np.float64)).sum(axis=1)


def best(
    scores: Float64[np.ndarray, " B"], rows: Int64[np.ndarray, " B"], k: int
) -> tuple[Float64[np.ndarray, " k"], Int64[np.ndarray, " k"]]:
    """The `k` best, of equal scores the smallest numbers, in that order."""
    order = np.lexsort((rows, -scores))[:k]
    return scores[order], rows[order]


def slack(rows_BD: np.ndarray, query_D: np.ndarray) -> float:
    """More than a float32 inner product of these can be wrong by, in whatever order it is summed.

    The bound is D u / (1 - D u) times |x| |y| with u = 2^-24 (Higham 2002, section 3.1, with
    Cauchy-Schwarz); doubled for what the bound itself is rounded by.
    """
    largest = np.sqrt((rows_BD * rows_BD).sum(axis=1).max(initial=0.0))
    return float(2 * query_D.size * 2.0**-24 * largest * np.linalg.norm(query_D))


def _near(
    rough_B: np.ndarray, query_D: np.ndarray, block_BD: np.ndarray, scores: np.ndarray, k: int
) -> Int64[np.ndarray, " near"]:
    """The rows of a block that may be among the `k` best, with those that have `scores`."""
    margin = slack(block_BD, query_D)
    at_least = -np.inf
    if len(rough_B) > k:
        # k rows of the block are at least this good, so a row below it by more than twice the
        # error is beaten by all of them.
        at_least = np.partition(rough_B, len(rough_B) - k)[len(rough_B) - k] - 2 * margin
    if len(scores) >= k:
        at_least = max(at_least, scores[-1] - margin)
    return np.flatnonzero(rough_B >= at_least)
