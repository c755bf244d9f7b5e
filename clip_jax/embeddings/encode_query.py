"""Queries of a user, words or an image, as features of the model that made the embeddings."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from clip_jax.data.images import IMAGE_KINDS, ImageError, decode_image, eval_transform
from clip_jax.embeddings.folder import Embeddings
from clip_jax.errors import UserError
from clip_jax.evaluation.encoders import Encoders, encode_padded, unit_rows
from clip_jax.evaluation.zero_shot import class_embeddings

TEXT_BATCH_SIZE = 8
"""Texts of one call, filled up to it, so that few programs are compiled."""
MAX_PIXELS = 50_000_000
"""Largest image that a user may give: a few times what a camera makes."""


def check_model(embeddings: Embeddings, encoders: Encoders, model: str) -> None:
    """Raise UserError if these are not the encoders that made the embeddings."""
    info = embeddings.info
    if info is not None and info.identity != encoders.identity:
        raise UserError(
            f"{embeddings.folder} was made by {info.name} ({info.model}) with weights or settings"
            f" other than those of {model} now: give --model the one that made it, or embed again"
        )


def encode_text_query(encoders: Encoders, texts: Sequence[str]) -> Float32[np.ndarray, "Q D"]:
    """Return the unit features of texts, without a prompt around them."""
    tokens_QL = encoders.tokenizer(list(texts), encoders.context_length)
    return encode_padded(encoders.encode_text, tokens_QL, TEXT_BATCH_SIZE)


def encode_image_query(encoders: Encoders, data: bytes) -> Float32[np.ndarray, "1 D"]:
    """Return the unit feature of an encoded image.

    Raises:
      UserError: it is no image, is damaged, or has too many pixels.
    """
    try:
        image = decode_image(data, max_pixels=MAX_PIXELS)
        pixels_HWC = eval_transform(
            image, encoders.image_size, encoders.preprocess, max_pixels=MAX_PIXELS
        )
    except ImageError as e:
        raise UserError(f"the image cannot be used ({e}); give a {IMAGE_KINDS}") from None
    return unit_rows(encoders.encode_image(pixels_HWC[None]))


def class_probabilities(
    encoders: Encoders, z_image_1D: np.ndarray, labels: Sequence[str], template: str
) -> Float32[np.ndarray, " M"]:
    """Return the probability of each label for an image, at the model's own temperature.

    Raises:
      UserError: the template lacks its {}, or there are no labels.
    """
    class_MD = class_embeddings(
        encoders.encode_text,
        encoders.tokenizer,
        labels,
        [template],
        batch_size=TEXT_BATCH_SIZE,
        context_length=encoders.context_length,
    )
    logits_M = encoders.scale * (class_MD @ z_image_1D[0])
    p_M = np.exp(logits_M - logits_M.max())
    return (p_M / p_M.sum()).astype(np.float32)
