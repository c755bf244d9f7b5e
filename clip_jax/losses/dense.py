"""The losses by their definition, over the whole matrix of logits. `tiled` is tested against them.

Conventions, the same in both forms:

* `scale` multiplies the cosines: it is exp(logit_scale), not the logarithm as it is stored.
* A row with valid=False is masked: it is no positive, no negative and not in the mean, and what
  its features hold cannot matter. Without a valid row the loss and its gradients are 0.
* With `caption_id_B`, two different pairs with equal ids are masked: neither positive nor negative.
* Logits, loss and sums are float32. float32 features are multiplied as float32 on every backend
  (no TF32, no bfloat16 passes); the products of bfloat16 features are summed in float32.
* `negatives` are N more texts, each a negative of every image and nobody's positive (NegCLIP,
  arXiv:2210.01936). Columns are the B texts and then those: C = B + N. A text's own softmax is
  over images, and they have none.
* A tie counts as a miss in the accuracies, so that collapsed features score 0 and not 100 %.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt

from clip_jax.typing import Features, Rows, Scalar


class PairLosses(NamedTuple):
    """What each pair adds to a loss, float32 [B] each: the loss is the mean of their mean."""

    image_B: Float[Array, " B"]
    text_B: Float[Array, " B"]


class Negatives(NamedTuple):
    """Texts that are negatives alone.

    Attributes:
      z_ND: unit features.
      valid_N: False leaves a row out.
      caption_id_N: as the pairs' own.
    """

    z_ND: Float[Array, "N D"]
    valid_N: Bool[Array, " N"]
    caption_id_N: UInt[Array, " N"]


class LossOutput(NamedTuple):
    """A loss and its in-batch accuracies, float32 scalars.

    Attributes:
      loss: the mean over valid rows.
      image_accuracy: share of valid images whose positive is above every negative text.
      text_accuracy: share of valid texts whose positive is above every negative image.
    """

    loss: Float[Array, ""]
    image_accuracy: Float[Array, ""]
    text_accuracy: Float[Array, ""]


def softmax_loss(
    z_image_BD: Features,
    z_text_BD: Features,
    scale: Scalar,
    bias: Scalar,
    *,
    valid_B: Rows,
    caption_id_B: UInt[Array, " B"] | None,
    negatives: Negatives | None = None,
) -> LossOutput:
    """Return the symmetric InfoNCE of unit features (Radford et al. 2021, figure 3).

    `bias` is ignored: a constant leaves every softmax as it is.

    >>> z_BD, one, zero = jnp.eye(2), jnp.float32(1), jnp.float32(0)
    >>> valid_B = jnp.ones(2, bool)
    >>> output = softmax_loss(z_BD, z_BD, one, zero, valid_B=valid_B, caption_id_B=None)
    >>> print(f"{output.loss:.4f}")  # log(1 + 1/e)
    0.3133
    """
    del bias
    _, negative_BC = pair_masks(valid_B, caption_id_B, negatives)
    logits_BC = scale * cosines(z_image_BD, z_text_BD, valid_B, negatives)
    image_loss_B, text_loss_B = _softmax_losses(logits_BC, negative_BC)
    loss = jnp.sum((image_loss_B + text_loss_B) / 2) / count_valid(valid_B)
    return LossOutput(loss, *accuracies(logits_BC, negative_BC, valid_B))


def _softmax_losses(logits_BC: Float[Array, "B C"], negative_BC: Bool[Array, "B C"]) -> PairLosses:
    # The diagonal of an invalid row stays, so no row is all -inf: its two terms are 0.
    pairs, columns = logits_BC.shape
    unmasked_BC = negative_BC | jnp.eye(pairs, columns, dtype=bool)
    unmasked_logits_BC = jnp.where(unmasked_BC, logits_BC, -jnp.inf)
    positive_logit_B = jnp.diagonal(logits_BC)
    return PairLosses(
        jax.nn.logsumexp(unmasked_logits_BC, axis=1) - positive_logit_B,
        jax.nn.logsumexp(unmasked_logits_BC[:, :pairs], axis=0) - positive_logit_B,
    )


def pair_losses(
    name: str,
    z_image_BD: Features,
    z_text_BD: Features,
    scale: Scalar,
    bias: Scalar,
    *,
    valid_B: Rows,
    caption_id_B: UInt[Array, " B"] | None,
    negatives: Negatives | None = None,
) -> PairLosses:
    """Return the parts of a loss, "softmax" or "sigmoid", that each image and each text has in it.

    The sigmoid loss of a pair of different rows belongs to its image as to its text, so that both
    parts have the whole loss as their mean; `negatives` are in the image's part alone.
    """
    positive_BC, negative_BC = pair_masks(valid_B, caption_id_B, negatives)
    logits_BC = scale * cosines(z_image_BD, z_text_BD, valid_B, negatives)
    if name == "softmax":
        return _softmax_losses(logits_BC, negative_BC)
    loss_BC = _sigmoid_losses(logits_BC + bias, positive_BC, negative_BC)
    return PairLosses(jnp.sum(loss_BC, axis=1), jnp.sum(loss_BC[:, : len(loss_BC)], axis=0))


def sigmoid_loss(
    z_image_BD: Features,
    z_text_BD: Features,
    scale: Scalar,
    bias: Scalar,
    *,
    valid_B: Rows,
    caption_id_B: UInt[Array, " B"] | None,
    negatives: Negatives | None = None,
) -> LossOutput:
    """Return SigLIP's loss of unit features (Zhai et al. 2023, arXiv:2303.15343, algorithm 1).

    Every pair is a binary classification: the losses of all unmasked pairs are summed, and the sum
    is divided by the number of valid rows.
    """
    positive_BC, negative_BC = pair_masks(valid_B, caption_id_B, negatives)
    logits_BC = scale * cosines(z_image_BD, z_text_BD, valid_B, negatives) + bias
    total = jnp.sum(_sigmoid_losses(logits_BC, positive_BC, negative_BC))
    return LossOutput(total / count_valid(valid_B), *accuracies(logits_BC, negative_BC, valid_B))


def _sigmoid_losses(
    logits_BC: Float[Array, "B C"],
    positive_BC: Bool[Array, "B C"],
    negative_BC: Bool[Array, "B C"],
) -> Float[Array, "B C"]:
    # -log(sigmoid(x)) is softplus(-x); a negative's is -log(sigmoid(-x)).
    pair_loss_BC = jax.nn.softplus(jnp.where(positive_BC, -logits_BC, logits_BC))
    return jnp.where(positive_BC | negative_BC, pair_loss_BC, 0)


def pair_masks(
    valid_B: Rows,
    caption_id_B: UInt[Array, " B"] | None,
    negatives: Negatives | None = None,
) -> tuple[Bool[Array, "B C"], Bool[Array, "B C"]]:
    """Return the masks of the positive and of the negative (image, text) pairs.

    A pair in neither mask is in no sum.
    """
    valid_C = valid_B
    if negatives is not None:
        valid_C = jnp.concatenate([valid_B, negatives.valid_N])
    diagonal_BC = jnp.eye(valid_B.size, valid_C.size, dtype=bool)
    negative_BC = valid_B[:, None] & valid_C[None, :] & ~diagonal_BC
    if caption_id_B is not None:
        caption_id_C = caption_id_B
        if negatives is not None:
            caption_id_C = jnp.concatenate([caption_id_B, negatives.caption_id_N])
        negative_BC &= caption_id_B[:, None] != caption_id_C[None, :]
    return diagonal_BC & valid_B[:, None], negative_BC


def cosines(
    z_image_BD: Features,
    z_text_BD: Features,
    valid_B: Rows,
    negatives: Negatives | None = None,
) -> Float[Array, "B C"]:
    """Return the float32 dot products of all pairs: 0 where a row is invalid, be it NaN."""
    z_image_BD = zero_invalid(z_image_BD, valid_B)
    z_text_CD = zero_invalid(z_text_BD, valid_B)
    if negatives is not None:
        z_ND = zero_invalid(negatives.z_ND, negatives.valid_N)
        z_text_CD = jnp.concatenate([z_text_CD, z_ND])
    return dot_products(z_image_BD, z_text_CD)


def dot_products(
    z_image_rD: Float[Array, "r D"], z_text_cD: Float[Array, "c D"]
) -> Float[Array, "r c"]:
    """Return the float32 dot products of rows of images and rows of texts."""
    return jnp.einsum(
        "rD,cD->rc",
        z_image_rD,
        z_text_cD,
        precision=product_precision(z_image_rD.dtype),
        preferred_element_type=jnp.float32,
    )


def zero_invalid(z_BD: Features, valid_B: Rows) -> Features:
    """Set invalid rows to 0, which makes their gradients exactly 0 too."""
    return jnp.where(valid_B[:, None], z_BD, 0)


def count_valid(valid_B: Rows) -> Float[Array, ""]:
    """Return the number of valid rows, at least 1: the divisor of the means."""
    return jnp.maximum(jnp.sum(valid_B), 1).astype(jnp.float32)


def product_precision(dtype: DTypeLike) -> jax.lax.Precision:
    """Return the precision at which factors of this dtype are multiplied.

    float32 means float32: by default GPUs would round the factors to TF32, TPUs to bfloat16.
    """
    is_float32 = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if is_float32 else jax.lax.Precision.DEFAULT


def accuracies(
    logits_BC: Float[Array, "B C"], negative_BC: Bool[Array, "B C"], valid_B: Rows
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the shares of valid images, and of texts, whose positive is above all negatives."""
    positive_logit_B = jnp.diagonal(logits_BC)
    negative_logits_BC = jnp.where(negative_BC, logits_BC, -jnp.inf)
    negative_logits_BB = negative_logits_BC[:, : valid_B.size]
    image_hits = jnp.sum(valid_B & (positive_logit_B > jnp.max(negative_logits_BC, axis=1)))
    text_hits = jnp.sum(valid_B & (positive_logit_B > jnp.max(negative_logits_BB, axis=0)))
    return image_hits / count_valid(valid_B), text_hits / count_valid(valid_B)
