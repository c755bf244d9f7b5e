"""The losses as they are defined, over the whole matrix of logits. `tiled` is tested against them.

Conventions, the same in both forms:

* `scale` multiplies the cosines: it is exp(logit_scale), not its logarithm.
* A row with ok=False is nobody: no positive, no negative, not in the mean. What its features hold
  cannot matter. With no good row the loss and its gradients are 0.
* With `caption_id_B`, two different pairs with equal ids are masked: neither positive nor negative.
* Logits, loss and sums are float32. float32 features are multiplied as float32 on every backend
  (no TF32, no bfloat16 passes); the products of bfloat16 features are summed in float32.
* A tie counts as a miss in the accuracies, so that collapsed features score 0 and not 100 %.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt

from clip_jax.typing import Features, Rows, Scalar


class LossOutput(NamedTuple):
    """A loss and its in-batch accuracies, float32 scalars.

    Attributes:
      loss: the mean over good rows.
      image_accuracy: share of good images whose own text is above every unmasked other text.
      text_accuracy: share of good texts whose own image is above every unmasked other image.
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
) -> LossOutput:
    """Symmetric InfoNCE over unit-length features: Radford et al. 2021, figure 3.

    `bias` is ignored: a constant leaves every softmax as it is.
    """
    del bias
    own_BB, other_BB = pair_masks(valid_B, caption_id_B)
    logits_BB = scale * cosines(z_image_BD, z_text_BD, valid_B)
    # A bad row keeps its own cell, so no row is all -inf: its two terms are 0 by themselves.
    own_cell_BB = jnp.eye(valid_B.size, dtype=bool)
    seen_BB = jnp.where(other_BB | own_cell_BB, logits_BB, -jnp.inf)
    own_B = jnp.diagonal(logits_BB)
    image_B = jax.nn.logsumexp(seen_BB, axis=1) - own_B
    text_B = jax.nn.logsumexp(seen_BB, axis=0) - own_B
    loss = jnp.sum((image_B + text_B) / 2) / good_rows(valid_B)
    return LossOutput(loss, *accuracies(logits_BB, own_BB, other_BB, valid_B))


def sigmoid_loss(
    z_image_BD: Features,
    z_text_BD: Features,
    scale: Scalar,
    bias: Scalar,
    *,
    valid_B: Rows,
    caption_id_B: UInt[Array, " B"] | None,
) -> LossOutput:
    """SigLIP: every pair a yes-or-no question (Zhai et al. 2023, arXiv:2303.15343, algorithm 1).

    The sum over unmasked pairs, divided by the number of good rows.
    """
    own_BB, other_BB = pair_masks(valid_B, caption_id_B)
    logits_BB = scale * cosines(z_image_BD, z_text_BD, valid_B) + bias
    # -log(sigmoid(x)) is softplus(-x); the sign turns for the pairs that do not belong together.
    pair_BB = jax.nn.softplus(jnp.where(own_BB, -logits_BB, logits_BB))
    loss = jnp.sum(jnp.where(own_BB | other_BB, pair_BB, 0)) / good_rows(valid_B)
    return LossOutput(loss, *accuracies(logits_BB, own_BB, other_BB, valid_B))


def pair_masks(
    valid_B: Rows, caption_id_B: UInt[Array, " B"] | None
) -> tuple[Bool[Array, "B B"], Bool[Array, "B B"]]:
    """Which (image, text) cells are positives, and which are negatives; the rest is masked."""
    own_cell_BB = jnp.eye(valid_B.size, dtype=bool)
    other_BB = valid_B[:, None] & valid_B[None, :] & ~own_cell_BB
    if caption_id_B is not None:
        other_BB &= caption_id_B[:, None] != caption_id_B[None, :]
    return own_cell_BB & valid_B[:, None], other_BB


def cosines(z_image_BD: Features, z_text_BD: Features, valid_B: Rows) -> Float[Array, "B B"]:
    """float32 dot products; 0 where a row is bad, be its features NaN."""
    z_image_BD, z_text_BD = good_features(z_image_BD, valid_B), good_features(z_text_BD, valid_B)
    return jnp.einsum(
        "iD,jD->ij",
        z_image_BD,
        z_text_BD,
        precision=product_precision(z_image_BD.dtype),
        preferred_element_type=jnp.float32,
    )


def good_features(z_BD: Features, valid_B: Rows) -> Features:
    """Bad rows set to 0, which also makes their gradients exactly 0."""
    return jnp.where(valid_B[:, None], z_BD, 0)


def good_rows(valid_B: Rows) -> Float[Array, ""]:
    """The number of good rows, at least 1: what the sums are divided by."""
    return jnp.maximum(jnp.sum(valid_B), 1).astype(jnp.float32)


def product_precision(dtype: DTypeLike) -> jax.lax.Precision:
    """float32 means float32: by default GPUs would round the factors to TF32, TPUs to bfloat16."""
    exact = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


def accuracies(
    logits_BB: Float[Array, "B B"],
    own_BB: Bool[Array, "B B"],
    other_BB: Bool[Array, "B B"],
    valid_B: Rows,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Shares of good images, and of good texts, whose own partner is strictly the best."""
    own_B = jnp.diagonal(logits_BB)
    negative_BB = jnp.where(other_BB, logits_BB, -jnp.inf)
    image_hits = jnp.sum(valid_B & (own_B > jnp.max(negative_BB, axis=1)))
    text_hits = jnp.sum(valid_B & (own_B > jnp.max(negative_BB, axis=0)))
    return image_hits / good_rows(valid_B), text_hits / good_rows(valid_B)
