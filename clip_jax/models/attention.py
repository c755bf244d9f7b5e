"""Attention, its kernel chosen when a program is traced."""

import jax
from jaxtyping import Array, Int


def attend(
    q_BLNK: Array,
    k_BLNK: Array,
    v_BLNK: Array,
    *,
    is_causal: bool = False,
    visible_B: Int[Array, " B"] | None = None,
    kernel: str = "auto",
) -> Array:
    """Softmax attention, scaled by K^-1/2.

    `visible_B`: how many leading keys the queries of a sequence may see; None is all.
    """
    del kernel
    return jax.nn.dot_product_attention(
        q_BLNK, k_BLNK, v_BLNK, is_causal=is_causal, key_value_seq_lengths=visible_B
    )
