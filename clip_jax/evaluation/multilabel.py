"""Measure classification where an image has several classes: mean average precision."""

import numpy as np
from jaxtyping import Bool, Float

MEAN_AVERAGE_PRECISION = "mean_average_precision"


def average_precisions(
    score_BM: Float[np.ndarray, "B M"], positive_BM: Bool[np.ndarray, "B M"]
) -> Float[np.ndarray, " M"]:
    """Return each class's average precision: the mean precision at its images' own ranks.

    It is CLIP_benchmark's definition, in which a class without images has 0 and counts in the
    mean. Of equal scores the first image ranks first.

    >>> average_precisions(np.array([[0.9], [0.5], [0.1]]), np.array([[True], [False], [True]]))
    array([0.83333333])
    """
    order_BM = np.argsort(-score_BM, axis=0, kind="stable")
    hit_BM = np.take_along_axis(positive_BM, order_BM, axis=0)
    precision_BM = np.cumsum(hit_BM, axis=0) / np.arange(1, len(hit_BM) + 1)[:, None]
    return (precision_BM * hit_BM).sum(axis=0) / np.maximum(hit_BM.sum(axis=0), 1)
