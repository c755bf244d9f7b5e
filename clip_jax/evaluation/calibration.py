"""Compute the expected calibration error: whether probabilities mean what they say."""

import numpy as np
from jaxtyping import Bool, Float

BINS = 15

# "images", their mean "confidence", and their "accuracy".
Bin = dict[str, int | float]


def reliability(
    share_B: Float[np.ndarray, " B"], right_B: Bool[np.ndarray, " B"], *, bins: int = BINS
) -> list[Bin]:
    """Return, for each bin of equal width, how sure the model was and how often right.

    Args:
      share_B: the probability of each image's first class. Bin i holds (i/bins, (i+1)/bins].
      right_B: whether that class is the image's own.
    """
    bin_B = np.clip(np.ceil(share_B * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(bin_B, minlength=bins)
    confidence = np.bincount(bin_B, share_B, bins) / np.maximum(count, 1)
    accuracy = np.bincount(bin_B, right_B, bins) / np.maximum(count, 1)
    rows = zip(count, confidence, accuracy, strict=True)
    return [{"images": int(n), "confidence": float(c), "accuracy": float(a)} for n, c, a in rows]


def calibration_error(
    share_B: Float[np.ndarray, " B"], right_B: Bool[np.ndarray, " B"], *, bins: int = BINS
) -> float:
    """Return the mean distance of confidence and accuracy over the bins, by their images.

    (Guo et al. 2017, arXiv:1706.04599, equation 3.)

    >>> round(calibration_error(np.array([0.8, 0.8]), np.array([True, False])), 6)
    0.3
    """
    table = reliability(share_B, right_B, bins=bins)
    total = sum(row["images"] * abs(row["confidence"] - row["accuracy"]) for row in table)
    return total / len(share_B)
