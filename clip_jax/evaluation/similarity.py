"""The cosines of the images of a batch with their own captions."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32

from clip_jax.evaluation.encoders import Encoders, encode_padded, unit_rows


def similarities(
    encoders: Encoders, batch: Mapping[str, Any], text_batch_size: int
) -> Float32[np.ndarray, " B"]:
    """Return the cosine of each image and its caption, or the mean over its captions.

    Training draws one of several captions, so the mean is what it gets. It is NaN where the row is
    not valid or has no caption. A batch is a `data.loader.Batch` of evaluation.
    """
    score_B = np.full(len(batch["valid"]), np.nan, np.float32)
    pairs = [
        (row, caption)
        for row in np.flatnonzero(batch["valid"]).tolist()
        for caption in batch["captions"][row]
    ]
    if not pairs:
        return score_B
    row_of_text = np.array([row for row, _ in pairs])
    tokens_BL = encoders.tokenizer([text for _, text in pairs], encoders.context_length)
    z_text_BD = encode_padded(encoders.encode_text, tokens_BL, text_batch_size)
    z_image_BD = np.asarray(encoders.encode_image(batch["image"]))
    # Bad rows are not looked at: what the encoder makes of a placeholder counts nowhere.
    rows, image_of_text = np.unique(row_of_text, return_inverse=True)
    z_image_BD = unit_rows(z_image_BD[rows])
    cosine = np.einsum("bD,bD->b", z_image_BD[image_of_text], z_text_BD)
    counts = np.bincount(image_of_text)
    score_B[rows] = np.bincount(image_of_text, cosine) / counts
    return score_B
