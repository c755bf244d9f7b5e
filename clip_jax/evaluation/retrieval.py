"""Measure image-text retrieval: recall at k in both directions, one block of scores at a time."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from clip_jax.evaluation.encoders import equal_blocks

# Scores of one block: 64 MiB in float32, whatever the number of pairs.
BLOCK_SCORES = 1 << 24
KS = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The number of candidates that are nearer to each query than its nearest right one.

    Attributes:
      image_of_text: for each text as the query, among images.
      text_of_image: for each image as the query, among texts.
    """

    image_of_text: Int[np.ndarray, " texts"]
    text_of_image: Int[np.ndarray, " images"]


def retrieval_ranks(
    z_image_BD: Float[np.ndarray, "images D"],
    z_text_BD: Float[np.ndarray, "texts D"],
    image_of_text: Int[np.ndarray, " texts"],
    *,
    captions: Sequence[str] | None,
    block_scores: int = BLOCK_SCORES,
) -> Ranks:
    """Return the rank of every query's nearest right candidate.

    Of equal scores the lower index is nearer.

    Args:
      z_image_BD, z_text_BD: unit features.
      image_of_text: each text's image; every image has at least one text.
      captions: what each text says. A text then counts as right for every
        image that has an equal caption, because no encoder could tell such texts apart.
        CLIP_benchmark does not do so, which None gives. It matters where captions repeat; emoji
        names repeat between vendors only, so within one vendor's drawings rarely.
      block_scores: scores in memory at a time.
    """
    image_of_text = np.asarray(image_of_text)
    if captions is None:
        caption_of_text = np.arange(len(z_text_BD))
    else:
        numbers = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        caption_of_text = np.array([numbers[caption] for caption in captions])
    # A caption joins its images and its texts; a text is right where its caption is.
    pairs = np.unique(np.stack([caption_of_text, image_of_text]), axis=1)
    images_of_caption = _groups(pairs[0], pairs[1])
    captions_of_image = _groups(pairs[1], pairs[0])
    texts_of_caption = _groups(caption_of_text, np.arange(len(z_text_BD)))

    def right_images(text: int) -> np.ndarray:
        return images_of_caption[caption_of_text[text]]

    def right_texts(image: int) -> np.ndarray:
        return np.concatenate([texts_of_caption[caption] for caption in captions_of_image[image]])

    return Ranks(
        _best_ranks(z_text_BD, z_image_BD, right_images, block_scores),
        _best_ranks(z_image_BD, z_text_BD, right_texts, block_scores),
    )


def recalls(ranks: Ranks, ks: Sequence[int] = KS) -> dict[str, float]:
    """Return the recall at k, named and defined as in CLIP_benchmark's `zeroshot_retrieval`.

    `image_retrieval_recall@k`: share of texts with a right image among the k nearest;
    `text_retrieval_recall@k`: share of images with a right text among the k nearest. A k above the
    number of candidates counts them all.

    >>> recalls(Ranks(image_of_text=np.array([0, 2]), text_of_image=np.array([0, 0])), ks=(1,))
    {'image_retrieval_recall@1': 0.5, 'text_retrieval_recall@1': 1.0}
    """
    of_text, of_image = ranks.image_of_text, ranks.text_of_image
    metrics = {f"image_retrieval_recall@{k}": float((of_text < k).mean()) for k in ks}
    return metrics | {f"text_retrieval_recall@{k}": float((of_image < k).mean()) for k in ks}


def _groups(keys: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
    """Return the values of each key 0, 1, ..., for keys of which none is missing."""
    order = np.argsort(keys, kind="stable")
    return np.split(values[order], np.cumsum(np.bincount(keys))[:-1])


def _best_ranks(
    queries_BD: np.ndarray,
    candidates_BD: np.ndarray,
    right: Callable[[int], np.ndarray],
    block_scores: int,
) -> Int[np.ndarray, " queries"]:
    """Count the candidates that are nearer than each query's nearest right one, `right(query)`."""
    rows = max(1, min(len(queries_BD), block_scores // len(candidates_BD)))
    candidates = jnp.asarray(candidates_BD)
    ranks = []
    for number, (block_bD, used) in enumerate(equal_blocks(queries_BD, rows)):
        right_bB = np.zeros((rows, len(candidates_BD)), bool)
        for row in range(used):
            right_bB[row, right(number * rows + row)] = True
        ranks.append(np.asarray(_ranks(block_bD, candidates, right_bB))[:used])
    return np.concatenate(ranks)


@jax.jit
def _ranks(
    queries_bD: Float[jax.Array, "b D"],
    candidates_BD: Float[jax.Array, "B D"],
    right_bB: Bool[jax.Array, "b B"],
) -> Int[jax.Array, " b"]:
    # As in zero_shot.top_classes: rounded inputs would swap close neighbors.
    scores_bB = jnp.matmul(queries_bD, candidates_BD.T, precision=jax.lax.Precision.HIGHEST)
    right_scores_bB = jnp.where(right_bB, scores_bB, -jnp.inf)
    best_b1 = right_scores_bB.max(axis=1, keepdims=True)
    first_b1 = right_scores_bB.argmax(axis=1, keepdims=True)
    ties_bB = (scores_bB == best_b1) & (jnp.arange(scores_bB.shape[1]) < first_b1)
    return ((scores_bB > best_b1) | ties_bB).sum(axis=1)
