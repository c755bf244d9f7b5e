"""A transformer's last block where one row of every sequence is asked for.

That row's query meets all rows, and projecting them to keys and values for it would take most of
the block's time. By associativity no row needs to be projected: q (h W_k)^T = (q W_k^T) h^T, and
p (h W_v) = (p h) W_v. A key's bias adds the same to all logits of a head, which the softmax does
not see; a value's bias is added once, since probabilities sum to one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clip_jax.models.attention import float32_logits
from clip_jax.models.minimal_block import BlockParts, dense, scaled
from clip_jax.models.packing import HIDDEN, Packing


def pooled_block(
    parts: BlockParts,
    params: Any,
    x_ND: Float[Array, "N D"],
    pool_index_B: Int[Array, " B"],
    packing: Packing,
    *,
    is_causal: bool,
) -> Float[Array, "B 1 D"]:
    """Return row `pool_index_B[i]` of sequence i behind the block; `params` are the block's.

    Equal to that row of all, to rounding.
    """
    attn, mlp = params["attn"], params["mlp"]
    gain, bias = params["ln_1"]["scale"], params["ln_1"]["bias"]
    own, seen = _positions(pool_index_B, packing, is_causal)
    with jax.named_scope("ln_1"):
        x_ND, h_ND = parts.norm(x_ND, gain, bias)
        h_SRD = packing.segments(parts.target.split_rows(h_ND))
        # Products with rows of one 1 are exact, and their gradient is no scatter.
        select = own.astype(x_ND.dtype)
        x_BD = jnp.einsum("sqr,srd->sqd", select, packing.segments(x_ND)).reshape(-1, len(gain))
        h_BD = jnp.einsum("sqr,srd->sqd", select, h_SRD).reshape(-1, len(gain))
    with jax.named_scope("attn"):
        q_BNK = _by_head(attn["q_proj"], dense(parts, attn["q_proj"], h_BD, inputs=1))
        scale = q_BNK.shape[-1] ** -0.5
        with jax.named_scope("attend"):
            q_BND = jnp.einsum("bnk,dnk->bnd", q_BNK, attn["k_proj"]["kernel"].astype(parts.dtype))
            y_BND = _attend(q_BND, h_SRD, seen, scale)
            v_DNK = attn["v_proj"]["kernel"].astype(parts.dtype)
            y_BNK = jnp.einsum("bnd,dnk->bnk", y_BND, v_DNK)
            y_BNK = y_BNK + attn["v_proj"]["bias"].astype(parts.dtype)
        y_BD = dense(parts, attn["out_proj"], y_BNK.reshape(x_BD.shape), inputs=2)
        x_BD = x_BD + scaled(params, "ls_1", y_BD)
    with jax.named_scope("ln_2"):
        h_BD = parts.plain_norm(x_BD, params["ln_2"]["scale"], params["ln_2"]["bias"])
    with jax.named_scope("mlp"):
        y_BD = parts.activation(dense(parts, mlp["c_fc"], h_BD, inputs=1))
        x_BD = x_BD + scaled(params, "ls_2", dense(parts, mlp["c_proj"], y_BD, inputs=1))
    return x_BD[:, None]


def _positions(
    pool_index_B: Int[Array, " B"], packing: Packing, is_causal: bool
) -> tuple[Bool[Array, "S Q R"], Bool[Array, "S Q R"]]:
    """Return of each segment's sequences which row is the pooled one, and which rows it sees."""
    row_R = jnp.arange(packing.segment)
    sequence_R, position_R = row_R // packing.stride, row_R % packing.stride
    is_of_QR = jnp.arange(packing.sequences)[:, None] == sequence_R
    pool_SQ1 = pool_index_B.reshape(-1, packing.sequences, 1)
    own_SQR = is_of_QR & (position_R == pool_SQ1)
    seen_R = position_R < packing.length
    seen_SQR = is_of_QR & (position_R <= pool_SQ1 if is_causal else seen_R)
    return own_SQR, jnp.broadcast_to(seen_SQR, own_SQR.shape)


def _by_head(projection: Any, x_BD: Float[Array, "B D"]) -> Float[Array, "B N K"]:
    return x_BD.reshape(-1, *projection["bias"].shape)


def _attend(
    q_BND: Float[Array, "B N D"],
    h_SRD: Float[Array, "S R D"],
    seen_SQR: Bool[Array, "S Q R"],
    scale: float,
) -> Float[Array, "B N D"]:
    """Return each head's rows, weighted by its softmax over those that are seen."""
    segments, sequences, _ = seen_SQR.shape
    heads, width = q_BND.shape[1:]
    q_SMD = q_BND.reshape(segments, sequences * heads, width)
    logits = float32_logits(q_SMD, h_SRD)
    seen = jnp.repeat(seen_SQR, heads, axis=1)
    p_SMR = jax.nn.softmax(jnp.where(seen, logits * scale, HIDDEN), axis=-1)
    y_SMD = jnp.einsum("smr,srd->smd", p_SMR.astype(h_SRD.dtype), h_SRD)
    return y_SMD.reshape(-1, heads, width)
