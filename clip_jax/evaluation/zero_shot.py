"""Classify zero-shot (CLIP paper, section 3.1): images against the embeddings of names."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int

from clip_jax.errors import UserError
from clip_jax.evaluation.encoders import EncodeText, encode_padded, equal_blocks, unit_rows
from clip_jax.evaluation.prompts import check_templates
from clip_jax.typing import Tokenizer

# 80 templates of 3,600 names would be a gigabyte of features.
MAX_PROMPTS = 8192
# Images whose scores of all classes are there at a time.
BLOCK_ROWS = 4096


def class_embeddings(
    encode_text: EncodeText,
    tokenizer: Tokenizer,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int,
    context_length: int,
    max_prompts: int = MAX_PROMPTS,
) -> Float32[np.ndarray, "M D"]:
    """Return one unit vector a class: the mean of its prompts' unit features, made unit again.

    They are the vectors of open_clip's `build_zero_shot_classifier`, transposed.

    Args:
      encode_text: int32 [batch_size, context_length] -> [batch_size, D].
      class_names: M names, in label order.
      templates: T prompts with "{}" for the name.
      batch_size: prompts an `encode_text` call; with fewer prompts in all, their number.
      max_prompts: prompts whose features are in memory at a time.

    Raises:
      UserError: there is no class, or a template lacks its "{}".
    """
    if not class_names:
        raise UserError("there are no class names: zero-shot classification needs at least one")
    templates = check_templates(templates)
    classes_at_once = max(1, max_prompts // len(templates))
    batch_size = min(
        batch_size, classes_at_once * len(templates), len(class_names) * len(templates)
    )
    parts = []
    for start in range(0, len(class_names), classes_at_once):
        names = class_names[start : start + classes_at_once]
        tokens_BL = tokenizer(
            [t.replace("{}", n) for n in names for t in templates], context_length
        )
        z_BD = encode_padded(encode_text, tokens_BL, batch_size)
        parts.append(unit_rows(z_BD.reshape(len(names), len(templates), -1).mean(axis=1)))
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnames=("k",))
def top_classes(
    z_image_BD: Float[jax.Array | np.ndarray, "B D"],
    class_MD: Float[jax.Array | np.ndarray, "M D"],
    scale: Float[jax.Array, ""] | float,
    *,
    k: int,
) -> tuple[Int[jax.Array, "B k"], Float[jax.Array, "B k"]]:
    """Return the k likeliest classes of each image, likeliest first, and their probabilities.

    Both inputs have rows of unit length. Of equal classes the lower number comes first, as in
    argmax. Probabilities are of a softmax over all M classes at this scale (not its logarithm).
    """
    # Matrix units round float32 inputs at the default precision, enough to swap close classes.
    cosine_BM = jnp.matmul(z_image_BD, class_MD.T, precision=jax.lax.Precision.HIGHEST)
    cosine_Bk, top_Bk = jax.lax.top_k(cosine_BM, k)
    total_B1 = jax.nn.logsumexp(scale * cosine_BM, axis=1, keepdims=True)
    return top_Bk, jnp.exp(scale * cosine_Bk - total_B1)


def rank_classes(
    z_image_BD: Float32[np.ndarray, "B D"],
    class_MD: Float32[np.ndarray, "M D"],
    scale: float,
    *,
    k: int = 5,
    block: int = BLOCK_ROWS,
) -> tuple[Int[np.ndarray, "B k"], Float[np.ndarray, "B k"]]:
    """Return `top_classes` of any number of images, `block` at a time; k may be more than M."""
    k = min(k, len(class_MD))
    block = min(block, len(z_image_BD))
    tops, shares = [], []
    for part_bD, used in equal_blocks(z_image_BD, block):
        top, share = top_classes(part_bD, class_MD, scale, k=k)
        tops.append(np.asarray(top)[:used])
        shares.append(np.asarray(share)[:used])
    return np.concatenate(tops), np.concatenate(shares)


def zero_shot_metrics(
    top_Bk: Int[np.ndarray, "B k"], label_B: Int[np.ndarray, " B"], *, num_classes: int
) -> dict[str, float]:
    """Return the accuracy as CLIP_benchmark's `zeroshot_classification` defines it.

    Args:
      top_Bk: each image's classes, likeliest first; k is at least min(5, num_classes).
      label_B: the right class of each image.

    Returns:
      By name: `acc1` and `acc5`, the share of images whose class is the first, or one of the first
      five (NaN under five classes), and `mean_per_class_recall`, acc1 of each class that has
      images, averaged over these classes.
    """
    right_B = top_Bk[:, 0] == label_B
    images_M = np.bincount(label_B, minlength=num_classes)
    recall_M = np.bincount(label_B[right_B], minlength=num_classes) / np.maximum(images_M, 1)
    in_five_B = (top_Bk[:, :5] == label_B[:, None]).any(axis=1)
    return {
        "acc1": float(right_B.mean()),
        "acc5": float(in_five_B.mean()) if num_classes >= 5 else float("nan"),
        "mean_per_class_recall": float(recall_M[images_M > 0].mean()),
    }
