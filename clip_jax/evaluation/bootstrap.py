"""Compute bootstrap intervals: how far a figure could be off by the choice of the images alone.

They are percentile intervals of 95 % from 1,000 resamples (Efron and Tibshirani 1993, chapter 13),
and say nothing of another training seed or another data set.
"""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Bool, Float, Int

RESAMPLES = 1000
TAILS = (2.5, 97.5)

Interval = tuple[float, float]


def ratio_intervals(
    hits_BK: Float[np.ndarray, "B K"], counts_BK: Float[np.ndarray, "B K"], *, seed: int = 0
) -> list[Interval]:
    """Return the intervals of K shares, sum(hits) / sum(counts), when the B images are drawn anew.

    An image with several captions is drawn with all of them: they are not independent.
    """
    rng = np.random.default_rng(seed)
    size = len(hits_BK)
    stacked_B2K = np.concatenate([hits_BK, counts_BK], axis=1)
    shares = np.zeros((RESAMPLES, hits_BK.shape[1]))
    for i in range(RESAMPLES):
        weight_B = np.bincount(rng.integers(size, size=size), minlength=size)
        hits, counts = np.split(weight_B @ stacked_B2K, 2)
        shares[i] = hits / np.maximum(counts, 1)
    return _percentiles(shares)


def mean_recall_interval(
    right_B: Bool[np.ndarray, " B"], label_B: Int[np.ndarray, " B"], *, seed: int = 0
) -> Interval:
    """Return the interval of the recall averaged over the classes, when the images are drawn anew.

    Only classes that have images count; one of which none is drawn is left out of that resample's
    mean.
    """
    rng = np.random.default_rng(seed)
    size = len(label_B)
    means = np.zeros((RESAMPLES, 1))
    for i in range(RESAMPLES):
        weight_B = np.bincount(rng.integers(size, size=size), minlength=size)
        images_M = np.bincount(label_B, weight_B)
        right_M = np.bincount(label_B, weight_B * right_B)
        means[i] = (right_M[images_M > 0] / images_M[images_M > 0]).mean()
    return _percentiles(means)[0]


def score_intervals(
    score: Callable[[Int[np.ndarray, " B"]], Mapping[str, float]], size: int, *, seed: int = 0
) -> dict[str, Interval]:
    """Return the intervals of figures of any kind, when so many images are drawn anew.

    Args:
      score: computes the figures of the images at some positions. One that is missing in a
        resample, as that of a group of which none is drawn, has no interval.
      size: the number of images.
    """
    rng = np.random.default_rng(seed)
    draws = [dict(score(rng.integers(size, size=size))) for _ in range(RESAMPLES)]
    names = [name for name in draws[0] if all(name in draw for draw in draws)]
    shares = np.array([[draw[name] for name in names] for draw in draws])
    return dict(zip(names, _percentiles(shares), strict=True))


def _percentiles(shares: np.ndarray) -> list[Interval]:
    low, high = np.percentile(shares, TAILS, axis=0)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
