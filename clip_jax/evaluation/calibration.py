"""Whether probabilities mean what they say: the expected calibration error."""

import numpy as np
from jaxtyping import Bool, Float

BINS = 15


def reliability(
    share_B: Float[np.ndarray, " B"], right_B: Bool[np.ndarray, " B"], *, bins: int = BINS
) -> list[dict[str, int | float]]:
    """For each bin of equal width that holds images: how sure the model was, how often right.

    Args:
      share_B: the probability of each image's first class. Bin i holds (i/bins, (i+1)/bins].
    """
    place_B = np.clip(np.ceil(share_B * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place_B, minlength=bins)
    sure = np.bincount(place_B, share_B, bins) / np.maximum(count, 1)
    right = np.bincount(place_B, right_B, bins) / np.maximum(count, 1)
    rows = zip(count, sure, right, strict=True)
    return [{"images": int(n), "confidence": float(c), "accuracy": float(a)} for n, c, a in rows]


def calibration_error(
    share_B: Float[np.ndarray, " B"], right_B: Bool[np.ndarray, " B"], *, bins: int = BINS
) -> float:
    """Mean distance of confidence and accuracy over the bins, by their images
    (Guo et al. 2017, arXiv:1706.04599, equation 3)."""
    table = reliability(share_B, right_B, bins=bins)
    off = sum(row["images"] * abs(row["confidence"] - row["accuracy"]) for row in table)
    return off / len(share_B)
