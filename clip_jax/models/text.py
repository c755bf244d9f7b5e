"""The causal text transformer of CLIP (paper section 2.4; OpenAI `clip/model.py` CLIP)."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from clip_jax.models.layers import LayerNorm, Transformer, normal, text_block_init


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of a text transformer.

    Attributes:
      context_length: longest sequence, tokens, the start and end tokens included.
      vocab_size: entries of the token embedding.
      width, layers, heads: of the transformer.
      eot_id: the end-of-text token, where a sequence is read.
      mlp_ratio: hidden features of the MLP over the width.
    """

    width: int
    layers: int
    heads: int
    context_length: int = 77
    vocab_size: int = 49_408
    eot_id: int = 49_407
    mlp_ratio: float = 4.0

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)


def end_positions(tokens_BL: Int[Array, "B L"], eot_id: int) -> Int[Array, " B"]:
    """Where each row's first end token stands; 0 in a row that has none.

    OpenAI takes the largest id instead, which is the same until ids above the end token exist.
    """
    return jnp.argmax(tokens_BL == eot_id, axis=-1).astype(jnp.int32)


class TextTransformer(nn.Module):
    """Tokens to features: embedding, positions, causal blocks, ln_final, end token, projection.

    A row may be shorter than `context_length`: what stands behind the end token cannot matter in
    a causal tower, so the caller trims it.
    """

    config: TextConfig
    embed_dim: int
    activation: str
    read_early: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens_BL: Int[Array, "B L"]) -> Float[Array, "B D"]:
        """Features of token rows, not of unit length."""
        c = self.config
        x_BLD = nn.Embed(
            c.vocab_size,
            c.width,
            embedding_init=normal(0.02),
            dtype=self.dtype,
            name="token_embedding",
        )(tokens_BL)
        shape = (c.context_length, c.width)
        position_LD = self.param("positional_embedding", normal(0.01), shape)
        x_BLD = x_BLD + position_LD[: tokens_BL.shape[1]].astype(x_BLD.dtype)

        x_BD = Transformer(
            c.layers,
            c.heads,
            c.mlp_width,
            self.activation,
            text_block_init(c.width, c.layers),
            is_causal=True,
            read_early=self.read_early,
            dtype=self.dtype,
            name="transformer",
        )(x_BLD, end_positions(tokens_BL, c.eot_id))
        # Layer norm works on each row alone, so it may follow the read instead of preceding it.
        x_BD = LayerNorm(name="ln_final")(x_BD)
        shape = (c.width, self.embed_dim)
        projection_DD = self.param("text_projection", normal(c.width**-0.5), shape)
        return x_BD @ projection_DD.astype(x_BD.dtype)
