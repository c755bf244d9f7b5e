"""The Vision Transformer of CLIP, CLIPA and SigLIP (Radford et al. 2021, section 2.4)."""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from clip_jax.errors import UserError, check_choice
from clip_jax.models.block_form import BlockForm
from clip_jax.models.execution import DEFAULT_EXEC_CONFIG, ExecConfig
from clip_jax.models.formed_block import BlockInputs
from clip_jax.models.layers import (
    ACTIVATIONS,
    LAYER_NORM_EPS,
    BlockConfig,
    LayerNorm,
    gelu,
    normal,
    timm_block_init,
    torch_uniform,
    vision_block_init,
)
from clip_jax.models.map_head import MAPHead
from clip_jax.models.mbconv import MBConvStages
from clip_jax.models.query_pool import QueryPool
from clip_jax.models.rotary import rotary_tables
from clip_jax.models.sizes import check_sizes
from clip_jax.models.transformer import NO_INPUTS, Transformer

POOLS = ("token", "average", "map", "queries")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The sizes of an image transformer, and what sets its family apart.

    Attributes:
      image_size: side of the square input, pixels; what a last, partial patch would hold is cut.
      patch_size: side of a square patch, pixels.
      width, layers, heads: of the transformer; a head is width / heads features wide.
      mlp_ratio: hidden features of the MLP over the width.
      activation: of the MLPs, a name in `layers.ACTIVATIONS`.
      norm_eps: of the layer norms.
      pool: how one vector is made of all: "token", the class token (CLIP); "average", the mean of
        the patches (CLIPA); "map", attention of a learned query, with an MLP (SigLIP); "queries",
        attention of many, of which the first is read (CoCa).
      norm_after_pool: ln_post follows the average (CLIPA) instead of preceding it.
      class_token: a learned row stands before the patches (CLIP and CLIPA).
      pre_norm: ln_pre stands before the blocks (CLIP).
      patch_bias: the patch convolution has a bias (SigLIP).
      layer_scale: start of learned gains on the residual branches; None has none.
      project: a matrix to the shared space follows; without it the width is `embed_dim`.
      proj_bias: that projection has a bias (timm's towers).
      pool_heads, pool_mlp_ratio: of the attention of pool "map"; None is those of the blocks.
      form: what sets the blocks apart from CLIP's; None is CLIP's own.
      patch_stages: sides of the patches that convolutions make one after the other, a GELU between,
        all but the last of a quarter of the width (MobileCLIP-B); empty is one of `patch_size`.
      has_positions: rows have learned positions.
      class_position: the class token has one too.
      mbconv_widths: features of the two stages of convolutions that make the rows (ViTamin); empty
        has none.
      pool_queries: queries of pool "queries".
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0
    activation: str = "quick_gelu"
    norm_eps: float = LAYER_NORM_EPS
    pool: str = "token"
    norm_after_pool: bool = False
    class_token: bool = True
    pre_norm: bool = True
    patch_bias: bool = False
    layer_scale: float | None = None
    project: bool = True
    proj_bias: bool = False
    pool_heads: int | None = None
    pool_mlp_ratio: float | None = None
    form: BlockForm | None = None
    patch_stages: tuple[int, ...] = ()
    has_positions: bool = True
    class_position: bool = True
    mbconv_widths: tuple[int, ...] = ()
    pool_queries: int = 256

    def __post_init__(self) -> None:
        check_sizes(self, "vision")
        check_choice("vision.activation", self.activation, ACTIVATIONS)
        check_choice("vision.pool", self.pool, POOLS)
        if self.patch_size > self.image_size:
            raise UserError(
                f"vision.patch_size is {self.patch_size}, above vision.image_size {self.image_size}"
            )
        if self.pool == "token" and not self.class_token:
            raise UserError("vision.pool is 'token' without a class token; set class_token")

    @property
    def grid_size(self) -> int:
        """Return the number of patches along a side."""
        return self.image_size // self.patch_size

    @property
    def length(self) -> int:
        """Return the number of rows of the sequence: the patches, and the class token."""
        return self.grid_size**2 + self.class_token

    @property
    def mlp_width(self) -> int:
        """Return the number of hidden features of an MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def block(self) -> BlockConfig:
        """Return the config of the transformer's blocks.

        SigLIP starts as timm does, CLIP as PyTorch.
        """
        is_siglip = self.pool == "map"
        return BlockConfig(
            self.heads,
            self.mlp_width,
            self.activation,
            self.norm_eps,
            timm_block_init() if is_siglip else vision_block_init(self.width, self.mlp_width),
            layer_scale=self.layer_scale,
            form=self.form,
        )

    @property
    def pool_block(self) -> BlockConfig:
        """Return the config of the MAP head, which has the attention and the MLP of a block."""
        ratio = self.mlp_ratio if self.pool_mlp_ratio is None else self.pool_mlp_ratio
        return dataclasses.replace(
            self.block, heads=self.pool_heads or self.heads, mlp_width=int(self.width * ratio)
        )


class PatchProjection(nn.Module):
    """A convolution whose stride is its size, as one matrix product of the patches.

    Each output is the same sum over one patch. On a CPU at patches of 32 the product takes about
    half of the convolution's time, forward and backward.
    """

    width: int
    size: int
    use_bias: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B L D"]:
        """Return one row a patch, line by line; what a last, partial patch would hold is cut."""
        size, (batch, height, width, channels) = self.size, images_BHWC.shape
        rows, columns = height // size, width // size
        x = images_BHWC[:, : rows * size, : columns * size].astype(self.dtype)
        x = x.reshape(batch, rows, size, columns, size, channels).transpose(0, 1, 3, 2, 4, 5)
        x_BLP = x.reshape(batch, rows * columns, size * size * channels)
        init = torch_uniform(channels * size * size)
        kernel = self.param("kernel", init, (size, size, channels, self.width))
        x_BLD = x_BLP @ kernel.reshape(-1, self.width).astype(self.dtype)
        if self.use_bias:
            x_BLD = x_BLD + self.param("bias", init, (self.width,)).astype(self.dtype)
        return x_BLD


class VisionTransformer(nn.Module):
    """The image tower: patches, class token, positions, ln_pre, blocks, pool, projection."""

    config: ViTConfig
    embed_dim: int
    exec_config: ExecConfig = DEFAULT_EXEC_CONFIG

    @nn.compact
    def __call__(
        self,
        images_BHWC: Float[Array, "B H W 3"],
        train: bool = False,
        valid_B: Bool[Array, " B"] | None = None,
        patch_ids_Bl: Int[Array, "B l"] | None = None,
        path_scale_BK2: Float[Array, "B K 2"] | None = None,
    ) -> Float[Array, "B D"]:
        """Return features of normalized images, not of unit length.

        `train` and `valid_B` change nothing: they are of towers with batch norm.

        With `patch_ids_Bl` those patches of each image alone are seen (FLIP, Li et al. 2022).
        With `path_scale_BK2` the branches of each block have these factors (stochastic depth).
        """
        del train, valid_B
        c = self.config
        x_BLD = self._embed(images_BHWC)
        if patch_ids_Bl is not None:
            x_BLD = self._select_patches(x_BLD, patch_ids_Bl)
        if c.pre_norm:
            x_BLD = LayerNorm(c.norm_eps, name="ln_pre")(x_BLD)
        transformer = functools.partial(
            Transformer(c.layers, c.block, self.exec_config, name="transformer"),
            inputs=self._block_inputs(patch_ids_Bl),
            path_scale_BK2=path_scale_BK2,
        )
        norm = LayerNorm(c.norm_eps, name="ln_post")
        if c.pool == "token":
            pool_index_B = jnp.zeros(x_BLD.shape[0], jnp.int32)
            # Layer norm works on each row alone, so it may follow the pooling.
            x_BD = norm(transformer(x_BLD, pool_index_B)[:, 0])
        elif c.pool == "average":
            x_BLD = transformer(x_BLD)
            x_BLD = x_BLD if c.norm_after_pool else norm(x_BLD)
            x_BD = jnp.mean(self._patches(x_BLD), axis=1)
            x_BD = norm(x_BD) if c.norm_after_pool else x_BD
        elif c.pool == "queries":
            pool = QueryPool(
                c.pool_block, c.pool_queries, self.embed_dim, self.exec_config, name="attn_pool"
            )
            x_BD = norm(pool(transformer(x_BLD)))
        else:
            x_BLD = norm(transformer(x_BLD))
            x_BD = MAPHead(c.pool_block, self.exec_config, name="attn_pool")(x_BLD)
        if not c.project:
            return x_BD
        shape = (x_BD.shape[-1], self.embed_dim)
        projection_DD = self.param("proj", normal(c.width**-0.5), shape)
        x_BD = x_BD @ projection_DD.astype(x_BD.dtype)
        if c.proj_bias:
            bias_D = self.param("proj_bias", nn.initializers.zeros, (self.embed_dim,))
            x_BD = x_BD + bias_D.astype(x_BD.dtype)
        return x_BD

    def _block_inputs(self, patch_ids_Bl: Int[Array, "B l"] | None) -> BlockInputs:
        """Return what blocks of a form read beside the rows: how far each row turns."""
        c = self.config
        if c.form is None or c.form.rotary is None:
            return NO_INPUTS
        prefix = int(c.class_token)
        tables = rotary_tables(c.form.rotary, c.grid_size, c.width // c.heads, prefix)
        if patch_ids_Bl is None:
            return BlockInputs(jnp.asarray(tables))
        ids_Bl = jnp.pad(patch_ids_Bl + prefix, ((0, 0), (prefix, 0)))
        return BlockInputs(jnp.asarray(tables)[:, ids_Bl])

    def _embed(self, images_BHWC: Float[Array, "B H W 3"]) -> Float[Array, "B L D"]:
        """Return the projected patches behind the class token, their positions added."""
        c = self.config
        x_BLD = self._project_patches(images_BHWC)
        if not c.class_position:
            x_BLD = self._add_positions(x_BLD)
        batch = x_BLD.shape[0]
        small = normal(c.width**-0.5)
        if c.class_token:
            class_D = self.param("class_embedding", small, (c.width,))
            class_B1D = jnp.broadcast_to(class_D.astype(x_BLD.dtype), (batch, 1, c.width))
            x_BLD = jnp.concatenate([class_B1D, x_BLD], axis=1)
        return self._add_positions(x_BLD) if c.class_position else x_BLD

    def _add_positions(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Return the rows with their positions added, where they have any."""
        c = self.config
        if not c.has_positions:
            return x_BLD
        init = normal(0.02) if c.pool == "map" else normal(c.width**-0.5)  # timm's, OpenAI's
        position_LD = self.param("positional_embedding", init, x_BLD.shape[1:])
        return x_BLD + position_LD.astype(x_BLD.dtype)

    def _project_patches(self, images_BHWC: Float[Array, "B H W 3"]) -> Float[Array, "B L D"]:
        """Return the projected patches, line by line."""
        c, dtype = self.config, self.exec_config.dtype
        if c.mbconv_widths:
            stages = MBConvStages(c.mbconv_widths, c.width, self.exec_config, name="mbconv")
            return stages(images_BHWC)
        if not c.patch_stages:
            return PatchProjection(c.width, c.patch_size, c.patch_bias, dtype, name="conv1")(
                images_BHWC
            )
        *earlier, last = c.patch_stages
        x_BHWC, side = images_BHWC, c.image_size
        for i, size in enumerate(earlier):
            x_BLD = PatchProjection(c.width // 4, size, True, dtype, name=f"stem_{i}")(x_BHWC)
            side //= size
            x_BHWC = gelu(x_BLD).reshape(x_BLD.shape[0], side, side, -1)
        return PatchProjection(c.width, last, True, dtype, name=f"stem_{len(earlier)}")(x_BHWC)

    def _select_patches(
        self, x_BLD: Float[Array, "B L D"], patch_ids_Bl: Int[Array, "B l"]
    ) -> Float[Array, "B k D"]:
        """Return the class token, and the patches of these numbers in this order."""
        patches_BlD = jnp.take_along_axis(self._patches(x_BLD), patch_ids_Bl[:, :, None], axis=1)
        if not self.config.class_token:
            return patches_BlD
        return jnp.concatenate([x_BLD[:, :1], patches_BlD], axis=1)

    def _patches(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B l D"]:
        """Return the rows behind the class token."""
        return x_BLD[:, 1:] if self.config.class_token else x_BLD
