"""Classify by the nearest training images: k-nearest neighbors in cosine similarity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int

from clip_jax.evaluation.encoders import equal_blocks

# Similarities of one block: 64 MiB in float32.
BLOCK_SCORES = 1 << 24


def knn_votes(
    z_BD: Float32[np.ndarray, "B D"],
    train_ND: Float32[np.ndarray, "N D"],
    label_N: Int[np.ndarray, " N"],
    *,
    num_classes: int,
    k: int,
    temperature: float = 0.07,
) -> Float32[np.ndarray, "B M"]:
    """Return each class's votes among the k nearest training images.

    A vote weighs exp(cosine / temperature) (Wu et al. 2018, arXiv:1805.01978, section 3.4); DINO
    takes k 20 and 0.07.
    """
    k = min(k, len(train_ND))
    block = max(1, min(len(z_BD), BLOCK_SCORES // len(train_ND)))
    train, labels = jnp.asarray(train_ND), jnp.asarray(label_N, jnp.int32)
    parts = []
    for part_bD, used in equal_blocks(z_BD, block):
        votes = _votes(part_bD, train, labels, temperature, k=k, num_classes=num_classes)
        parts.append(np.asarray(votes)[:used])
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnames=("k", "num_classes"))
def _votes(
    z_bD: Float[jax.Array, "b D"],
    train_ND: Float[jax.Array, "N D"],
    label_N: Int[jax.Array, " N"],
    temperature: Float[jax.Array, ""] | float,
    *,
    k: int,
    num_classes: int,
) -> Float[jax.Array, "b M"]:
    cosine_bN = jnp.matmul(z_bD, train_ND.T, precision=jax.lax.Precision.HIGHEST)
    near_bk, index_bk = jax.lax.top_k(cosine_bN, k)
    # Less the largest, so that exp cannot overflow; votes compare within a row alone.
    weight_bk = jnp.exp((near_bk - near_bk[:, :1]) / temperature)
    votes_bM = jnp.zeros((len(z_bD), num_classes))
    return votes_bM.at[jnp.arange(len(z_bD))[:, None], label_N[index_bk]].add(weight_bk)
