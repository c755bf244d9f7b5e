"""The residual block of the families whose form is not CLIP's own: EVA, Perception Encoder, BERT.

It is computed plainly: a form with a backward pass of its own is `layers.ResidualBlock`'s alone.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clip_jax.models.attention import attend
from clip_jax.models.block_form import BlockForm
from clip_jax.models.execution import ExecConfig, dense_product
from clip_jax.models.gated_mlp import GatedMLP
from clip_jax.models.layers import (
    MLP,
    BlockConfig,
    LayerNorm,
    LayerScale,
    gather_rows,
    scale_path,
)
from clip_jax.models.rotary import rotate


class BlockInputs(NamedTuple):
    """What the blocks of a tower read beside the rows.

    Attributes:
      rotary: the tables of `rotary.rotary_tables`, [2, L, K] or [2, B, L, K]; None does not turn.
      seen_BL: which rows are seen by others; None is all.
    """

    rotary: Float[Array, "..."] | None = None
    seen_BL: Bool[Array, "B L"] | None = None


class FormedAttention(nn.Module):
    """Multi-head attention of a few query rows over all rows, with what a form adds to it."""

    config: BlockConfig
    form: BlockForm
    exec_config: ExecConfig

    @nn.compact
    def __call__(
        self,
        x_BLD: Array,
        inputs: BlockInputs,
        pool_index_B: Int[Array, " B"] | None = None,
    ) -> Array:
        """Return a row for each row, or for row `pool_index_B` of every sequence alone."""
        c, width = self.config, x_BLD.shape[-1]
        product = dense_product(self.exec_config)

        def project(name: str, x: Array, *, use_bias: bool = True) -> Array:
            return nn.DenseGeneral(
                (c.heads, width // c.heads),
                use_bias=use_bias,
                kernel_init=c.init.attention_in,
                dtype=self.exec_config.dtype,
                dot_general=product,
                name=name,
            )(x)

        query_BLD = x_BLD if pool_index_B is None else gather_rows(x_BLD, pool_index_B)
        q_BLNK = project("q_proj", query_BLD)
        k_BLNK = project("k_proj", x_BLD, use_bias=self.form.key_bias)
        v_BLNK = project("v_proj", x_BLD)
        if inputs.rotary is not None:
            q_BLNK = rotate(q_BLNK, _rows_of(inputs.rotary, pool_index_B))
            k_BLNK = rotate(k_BLNK, inputs.rotary)
        y_BLNK = self._attend(q_BLNK, k_BLNK, v_BLNK, inputs.seen_BL, pool_index_B)
        if self.form.inner_norms:
            y_BLD = y_BLNK.reshape(*y_BLNK.shape[:2], width)
            y_BLNK = LayerNorm(c.norm_eps, name="ln")(y_BLD).reshape(y_BLNK.shape)
        return nn.DenseGeneral(
            width,
            axis=(-2, -1),
            kernel_init=c.init.attention_out,
            dtype=self.exec_config.dtype,
            dot_general=product,
            name="out_proj",
        )(y_BLNK)

    def _attend(
        self,
        q_BLNK: Array,
        k_BLNK: Array,
        v_BLNK: Array,
        seen_BL: Array | None,
        pool_index_B: Array | None,
    ) -> Array:
        """Return attention to the rows that are seen."""
        is_causal = self.config.is_causal and pool_index_B is None
        lengths_B = pool_index_B + 1 if self.config.is_causal and pool_index_B is not None else None
        if seen_BL is None:
            return attend(
                q_BLNK,
                k_BLNK,
                v_BLNK,
                is_causal=is_causal,
                key_lengths_B=lengths_B,
                implementation=self.exec_config.attention,
                target=self.exec_config.target,
            )
        # Rows that are hidden anywhere are XLA's alone.
        return jax.nn.dot_product_attention(
            q_BLNK,
            k_BLNK,
            v_BLNK,
            mask=seen_BL[:, None, None, :],
            is_causal=is_causal,
            key_value_seq_lengths=lengths_B,
            implementation="xla",
        )


def _rows_of(tables: Array, index_B: Array | None) -> Array:
    """Return the tables of row `index_B[i]` of sequence i, [2, B, 1, K]; all of them for None."""
    if index_B is None:
        return tables
    if tables.ndim == 3:
        return jnp.asarray(tables)[:, index_B][:, :, None]
    return jnp.take_along_axis(tables, index_B[None, :, None, None], axis=2)


class FormedBlock(nn.Module):
    """Attention and MLP, each with a residual connection, the norms where the form has them."""

    config: BlockConfig
    exec_config: ExecConfig

    @nn.compact
    def __call__(
        self,
        x_BLD: Array,
        pool_index_B: Int[Array, " B"] | None,
        inputs: BlockInputs,
        path_scale_B2: Float[Array, "B 2"] | None = None,
    ) -> Array:
        """Return all rows [B, L, D], or with `pool_index_B` that row of every sequence [B, 1, D].

        The one row is equal to that row of all, as in `ResidualBlock`, and `path_scale_B2` is
        what it is there.
        """
        c, form = self.config, self.config.form
        assert form is not None
        ln_1, ln_2 = (LayerNorm(c.norm_eps, name=name) for name in ("ln_1", "ln_2"))
        h_BLD = ln_1(x_BLD) if form.norms == "before" else x_BLD
        attention = FormedAttention(c, form, self.exec_config, name="attn")
        y_BLD = attention(h_BLD, inputs, pool_index_B)
        if pool_index_B is not None:
            x_BLD = gather_rows(x_BLD, pool_index_B)
        x_BLD = self._join(x_BLD, y_BLD, ln_1, "ls_1", path_scale_B2, 0)
        h_BLD = ln_2(x_BLD) if form.norms == "before" else x_BLD
        if form.mlp_norm:
            h_BLD = LayerNorm(c.norm_eps, name="ln_mlp")(h_BLD)
        return self._join(x_BLD, self._mlp(form)(h_BLD), ln_2, "ls_2", path_scale_B2, 1)

    def _mlp(self, form: BlockForm) -> nn.Module:
        """Return the MLP of the form."""
        c = self.config
        if form.mlp == "plain":
            return MLP(c.mlp_width, c.activation, c.init, self.exec_config, name="mlp")
        norm_eps = c.norm_eps if form.inner_norms else None
        return GatedMLP(c.mlp_width, form.mlp, norm_eps, c.init, self.exec_config, name="mlp")

    def _join(
        self,
        x_BLD: Array,
        y_BLD: Array,
        norm: LayerNorm,
        scale: str,
        path_scale_B2: Array | None,
        branch: int,
    ) -> Array:
        """Return the sum of the rows and of a branch, the norm where the form has it."""
        c = self.config
        assert c.form is not None
        if c.form.norms == "behind":
            y_BLD = norm(y_BLD)
        if c.layer_scale is not None:
            y_BLD = LayerScale(c.layer_scale, name=scale)(y_BLD)
        x_BLD = x_BLD + scale_path(y_BLD, path_scale_B2, branch)
        return norm(x_BLD) if c.form.norms == "after" else x_BLD
