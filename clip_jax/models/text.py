"""The text transformer of CLIP and SigLIP (Radford et al. 2021, section 2.4; Zhai et al. 2023)."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clip_jax.errors import check_choice
from clip_jax.models.block_form import NORMS, BlockForm
from clip_jax.models.execution import DEFAULT_EXEC_CONFIG, ExecConfig
from clip_jax.models.formed_block import BlockInputs
from clip_jax.models.layers import (
    ACTIVATIONS,
    LAYER_NORM_EPS,
    BlockConfig,
    LayerNorm,
    normal,
    text_block_init,
)
from clip_jax.models.sizes import check_sizes
from clip_jax.models.transformer import NO_INPUTS, Transformer

POOLS = ("end", "last")
ENCODER_POOLS = ("mean", "first")
PROJECTIONS = ("linear", "mlp")


@dataclasses.dataclass(frozen=True)
class EncoderForm:
    """What sets a text encoder like BERT's apart from CLIP's own tower.

    Attributes:
      norms: where the blocks have theirs, as in `block_form.BlockForm`.
      positions: rows of the table of places; 0 has sinusoids instead, and larger tokens.
      pool: "mean", that of all tokens; "first", the first one.
      projection: to the shared space: "linear", a matrix; "mlp", two with a GELU between.
      pad_id: the token that pads, which is not seen.
    """

    norms: str
    positions: int
    pool: str
    projection: str
    pad_id: int = 1

    def __post_init__(self) -> None:
        check_sizes(self, "text.encoder")
        check_choice("text.encoder.norms", self.norms, NORMS)
        check_choice("text.encoder.pool", self.pool, ENCODER_POOLS)
        check_choice("text.encoder.projection", self.projection, PROJECTIONS)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The sizes of a text transformer, and what sets its family apart.

    Attributes:
      width, layers, heads: of the transformer.
      context_length: longest sequence, tokens, the start and end tokens included.
      vocab_size: entries of the token embedding.
      eot_id: the end-of-text token, whose position pool "end" takes.
      mlp_ratio: hidden features of the MLP over the width.
      activation: of the MLPs, a name in `layers.ACTIVATIONS`.
      norm_eps: of the layer norms.
      causal: a token sees itself and those before it; else all tokens, the padding too.
      pool: the position whose row becomes the features: "end", the first end token (CLIP); "last",
        the last position, which mostly holds padding (SigLIP and CLIPA, whose rows always have the
        full length).
      project: a matrix to the shared space follows; without it the width is `embed_dim`.
      proj_bias: that projection has a bias (SigLIP).
      class_token: a learned row stands behind the tokens, and is pooled (CoCa); padding, the
        tokens of id 0, is not seen.
      encoder: what an encoder like BERT's has besides; `causal` and `pool` mean nothing there.
        None is CLIP's own tower.
    """

    width: int
    layers: int
    heads: int
    context_length: int = 77
    vocab_size: int = 49_408
    eot_id: int = 49_407
    mlp_ratio: float = 4.0
    activation: str = "quick_gelu"
    norm_eps: float = LAYER_NORM_EPS
    causal: bool = True
    pool: str = "end"
    project: bool = True
    proj_bias: bool = False
    class_token: bool = False
    encoder: EncoderForm | None = None

    def __post_init__(self) -> None:
        check_sizes(self, "text")
        check_choice("text.activation", self.activation, ACTIVATIONS)
        check_choice("text.pool", self.pool, POOLS)

    @property
    def mlp_width(self) -> int:
        """Return the number of hidden features of an MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def supports_trimming(self) -> bool:
        """Return whether cutting rows behind their end tokens leaves the features as they are.

        Elsewhere padding is seen or pooled, and a row must come at the full `context_length`.
        """
        is_plain = not self.class_token and self.encoder is None
        return self.causal and self.pool == "end" and is_plain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTokens:
    """Captions one behind another in segments of rows, see `data.caption_packing`.

    Attributes:
      tokens_SR: int32; the segments of one part stand together.
      positions_SR: the place of each token in its caption.
      end_B: the row of each caption's end token among all rows of its part.
      parts: in how many parts the batch is split, a device's rows in each.
    """

    tokens_SR: Int[Array, "S R"]
    positions_SR: Int[Array, "S R"]
    end_B: Int[Array, " B"]
    parts: int = dataclasses.field(metadata={"static": True})

    def position_rows(self, position_LD: Float[Array, "L D"]) -> Float[Array, "S R D"]:
        """Return each token's row of a table of positions."""
        # A product with rows of one 1 is exact, and its gradient is no scatter.
        select_SRL = jax.nn.one_hot(self.positions_SR, len(position_LD), dtype=position_LD.dtype)
        return jnp.matmul(select_SRL, position_LD, precision="highest")

    def end_rows(self, x_SRD: Float[Array, "S R D"]) -> Float[Array, "B D"]:
        """Return the row of each caption's end token."""
        x_PND = x_SRD.reshape(self.parts, -1, x_SRD.shape[-1])
        end_Pn = self.end_B.reshape(self.parts, -1)
        select_PnN = jax.nn.one_hot(end_Pn, x_PND.shape[1], dtype=x_SRD.dtype)
        return jnp.matmul(select_PnN, x_PND, precision="highest").reshape(-1, x_SRD.shape[-1])


def end_positions(tokens_BL: Int[Array, "B L"], eot_id: int) -> Int[Array, " B"]:
    """Return the position of each row's first end token; 0 in a row that has none.

    OpenAI takes the largest id instead, which is the same until ids above the end token exist.
    """
    return jnp.argmax(tokens_BL == eot_id, axis=-1).astype(jnp.int32)


class TokenEmbedding(nn.Module):
    """A table of one vector a token.

    Its rows stay float32 until they are read, unlike those of `nn.Embed`, which casts the whole
    table and then sums a token's gradients in bfloat16: the start token's are as many as there are
    captions.
    """

    vocab_size: int
    width: int

    @nn.compact
    def __call__(self, tokens_BL: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Return the vectors of these tokens, float32."""
        shape = (self.vocab_size, self.width)
        return jnp.take(self.param("embedding", normal(0.02), shape), tokens_BL, axis=0)


class TextTransformer(nn.Module):
    """The text tower: embedding, positions, blocks, pooling, ln_final, projection.

    A row may be shorter than `context_length`: in a tower that supports trimming, what stands
    behind the end token cannot matter, and the caller cuts it, or packs several captions in a row.
    """

    config: TextConfig
    embed_dim: int
    exec_config: ExecConfig = DEFAULT_EXEC_CONFIG

    @nn.compact
    def __call__(
        self,
        tokens_BL: Int[Array, "B L"] | PackedTokens,
        path_scale_BK2: Float[Array, "B K 2"] | None = None,
    ) -> Float[Array, "B D"]:
        """Return features of captions, not of unit length; a packed tower supports trimming.

        With `path_scale_BK2` the branches of each block have these factors; packed captions have
        none of their own.
        """
        c = self.config
        packed = tokens_BL if isinstance(tokens_BL, PackedTokens) else None
        tokens_BL = tokens_BL.tokens_SR if isinstance(tokens_BL, PackedTokens) else tokens_BL
        batch, length = tokens_BL.shape
        table = TokenEmbedding(c.vocab_size, c.width, name="token_embedding")
        x_BLD = table(tokens_BL).astype(self.exec_config.dtype)
        inputs = NO_INPUTS
        if c.class_token:
            x_BLD = self._with_class_token(x_BLD)
            # In CoCa's weights a token hides itself by the place before it, and the row behind
            # the last token is seen: `correct_cls_mask` of open_clip is off.
            seen_BL = jnp.pad(tokens_BL != 0, ((0, 0), (1, 0)), constant_values=True)
            inputs, length = BlockInputs(seen_BL=seen_BL), length + 1
        shape = (c.context_length + c.class_token, c.width)
        position_LD = self.param("positional_embedding", normal(0.01), shape)
        position_LD = position_LD.astype(x_BLD.dtype)
        x_BLD = x_BLD + (packed.position_rows(position_LD) if packed else position_LD[:length])

        block = BlockConfig(
            c.heads,
            c.mlp_width,
            c.activation,
            c.norm_eps,
            text_block_init(c.width, c.layers),
            is_causal=c.causal,
            form=BlockForm() if c.class_token else None,
        )
        transformer = functools.partial(
            Transformer(c.layers, block, self.exec_config, name="transformer"),
            path_scale_BK2=path_scale_BK2,
        )
        if packed is not None:
            x_BD = packed.end_rows(transformer(x_BLD, None, packed.positions_SR))
        elif c.pool == "end" and not c.class_token:
            x_BD = transformer(x_BLD, end_positions(tokens_BL, c.eot_id))[:, 0]
        else:
            last_B = jnp.full(batch, length - 1, jnp.int32)
            x_BD = transformer(x_BLD, last_B, inputs=inputs)[:, 0]
        # Layer norm works on each row alone, so it may follow the pooling instead of preceding it.
        x_BD = LayerNorm(c.norm_eps, name="ln_final")(x_BD)
        return self._project(x_BD) if c.project else x_BD

    def _with_class_token(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B M D"]:
        """Return the rows with a learned one behind them."""
        batch, _, width = x_BLD.shape
        class_D = self.param("class_embedding", normal(0.01), (width,)).astype(x_BLD.dtype)
        class_B1D = jnp.broadcast_to(class_D, (batch, 1, width))
        return jnp.concatenate([x_BLD, class_B1D], axis=1)

    def _project(self, x_BD: Float[Array, "B W"]) -> Float[Array, "B D"]:
        """Return features of the tower's width projected to the shared space."""
        width = self.config.width
        shape = (width, self.embed_dim)
        projection_DD = self.param("text_projection", normal(width**-0.5), shape)
        x_BD = x_BD @ projection_DD.astype(x_BD.dtype)
        if self.config.proj_bias:
            zeros = nn.initializers.zeros
            bias_D = self.param("text_projection_bias", zeros, (self.embed_dim,))
            x_BD = x_BD + bias_D.astype(x_BD.dtype)
        return x_BD
