"""Text towers like BERT's: RoBERTa, XLM-RoBERTa, and the encoder of NLLB (M2M-100)."""

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from clip_jax.models.block_form import BlockForm
from clip_jax.models.execution import DEFAULT_EXEC_CONFIG, ExecConfig
from clip_jax.models.formed_block import BlockInputs
from clip_jax.models.layers import BlockConfig, LayerNorm, gelu, normal, timm_block_init
from clip_jax.models.text import TextConfig, TokenEmbedding
from clip_jax.models.transformer import Transformer


def sinusoids(length: int, width: int, first: int) -> Float[np.ndarray, "L D"]:
    """Return the rows of places `first` and on: sines, then cosines (Vaswani et al. 2017)."""
    half = width // 2
    frequencies = np.exp(np.arange(half, dtype=np.float32) * np.float32(-np.log(1e4) / (half - 1)))
    places = np.arange(first, first + length, dtype=np.float32)
    angles_LD = places[:, None] * frequencies
    return np.concatenate([np.sin(angles_LD), np.cos(angles_LD)], axis=1)


def mean_of_seen(x_BLD: Float[Array, "B L D"], seen_BL: Bool[Array, "B L"]) -> Array:
    """Return the mean of each caption's rows without those of its padding."""
    weights_BL = seen_BL / jnp.sum(seen_BL, axis=1, keepdims=True)
    return jnp.einsum("BL,BLD->BD", weights_BL.astype(x_BLD.dtype), x_BLD)


class TextEncoder(nn.Module):
    """A text tower whose tokens see all others, and whose padding is not seen.

    Places are counted from the one behind the padding's id, as in fairseq.
    """

    config: TextConfig
    embed_dim: int
    exec_config: ExecConfig = DEFAULT_EXEC_CONFIG

    @nn.compact
    def __call__(
        self,
        tokens_BL: Int[Array, "B L"],
        path_scale_BK2: Float[Array, "B K 2"] | None = None,
    ) -> Float[Array, "B D"]:
        """Return features of captions, not of unit length.

        With `path_scale_BK2` the branches of each block have these factors.
        """
        c, form = self.config, self.config.encoder
        assert form is not None
        seen_BL = tokens_BL != form.pad_id
        block = BlockConfig(
            c.heads,
            c.mlp_width,
            c.activation,
            c.norm_eps,
            timm_block_init(),
            form=BlockForm(norms=form.norms),
        )
        transformer = functools.partial(
            Transformer(c.layers, block, self.exec_config, name="transformer"),
            path_scale_BK2=path_scale_BK2,
        )
        x_BLD, inputs = self._embed(tokens_BL), BlockInputs(seen_BL=seen_BL)
        if form.pool == "first":
            first_B = jnp.zeros(tokens_BL.shape[0], jnp.int32)
            x_BD = transformer(x_BLD, first_B, inputs=inputs)[:, 0]
        else:
            x_BLD = transformer(x_BLD, inputs=inputs)
            x_BD = mean_of_seen(x_BLD, seen_BL)
        if form.norms == "before":
            # Layer norm works on each row alone, so it may follow the pooling of one.
            x_BD = LayerNorm(c.norm_eps, name="ln_final")(x_BD)
        return self._project(x_BD)

    def _embed(self, tokens_BL: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Return the vectors of the tokens, with their places."""
        c, form = self.config, self.config.encoder
        assert form is not None
        length, first = tokens_BL.shape[1], form.pad_id + 1
        x_BLD = TokenEmbedding(c.vocab_size, c.width, name="token_embedding")(tokens_BL)
        if not form.positions:
            x_BLD = x_BLD * c.width**0.5 + sinusoids(length, c.width, first)
            return x_BLD.astype(self.exec_config.dtype)
        table_PD = self.param("positional_embedding", normal(0.02), (form.positions, c.width))
        kind_1D = self.param("token_type_embedding", normal(0.02), (1, c.width))
        x_BLD = x_BLD + kind_1D + table_PD[first : first + length]
        return LayerNorm(c.norm_eps, name="ln_embed")(x_BLD).astype(self.exec_config.dtype)

    def _project(self, x_BD: Float[Array, "B W"]) -> Float[Array, "B D"]:
        """Return features projected to the shared space, by a matrix or two."""
        c, dtype = self.config, self.exec_config.dtype
        if c.encoder is not None and c.encoder.projection == "mlp":
            hidden = (c.width + self.embed_dim) // 2
            x_BD = gelu(nn.Dense(hidden, use_bias=False, dtype=dtype, name="proj_fc")(x_BD))
        width = x_BD.shape[-1]
        shape = (width, self.embed_dim)
        projection_DD = self.param("text_projection", normal(width**-0.5), shape)
        return x_BD @ projection_DD.astype(x_BD.dtype)
