"""Compute the cosines of the images of a batch with their own captions."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32

from clip_jax.evaluation.encoders import Encoders
from clip_jax.evaluation.features import encode_batch


def similarities(
    encoders: Encoders, batch: Mapping[str, Any], text_batch_size: int
) -> Float32[np.ndarray, " B"]:
    """Return the cosine of each image and its caption, or the mean over its captions.

    Training draws one of several captions, so the mean is what it gets. It is NaN where the row is
    not valid or has no caption. A batch is a `data.loader.Batch` of evaluation.

    Raises:
      UserError: a feature is not finite.
    """
    features = encode_batch(encoders, batch, 0, text_batch_size)
    image_of_text = features.image_of_text
    cosine = np.einsum("bD,bD->b", features.z_image_BD[image_of_text], features.z_text_BD)
    counts = np.bincount(image_of_text, minlength=len(features))
    totals = np.bincount(image_of_text, cosine, len(features))
    captioned = np.flatnonzero(counts)
    score_B = np.full(len(batch["valid"]), np.nan, np.float32)
    score_B[features.row_B[captioned]] = totals[captioned] / counts[captioned]
    return score_B
