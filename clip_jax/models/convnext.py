"""ConvNeXt (Liu et al. 2022, arXiv:2201.03545), as timm makes it for open_clip.

Patches of four pixels, then four stages of blocks, each behind the first at half the resolution: a
7x7 convolution of each channel alone, layer norm and an MLP at every place. The mean over the
places is normalized and projected.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clip_jax.errors import check_choice
from clip_jax.models.depthwise import DepthwiseConv
from clip_jax.models.execution import DEFAULT_EXEC_CONFIG, ExecConfig, remat_block
from clip_jax.models.layers import MLP, LayerNorm, LayerScale, normal, timm_block_init
from clip_jax.models.sizes import check_sizes
from clip_jax.models.vit import PatchProjection

HEADS = ("linear", "mlp")
STEM, HALVING = 4, 2  # sides of the patches that the stem and the later stages begin with
INIT = timm_block_init()


@dataclasses.dataclass(frozen=True)
class ConvNeXtConfig:
    """The sizes of a ConvNeXt.

    Attributes:
      image_size: side of the square input, pixels.
      depths, widths: blocks and features of each stage.
      norm_eps: of the layer norms.
      head: what projects to the shared space: "linear", a matrix; "mlp", two with a GELU between.
    """

    image_size: int
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    norm_eps: float = 1e-6
    head: str = "linear"

    def __post_init__(self) -> None:
        check_sizes(self, "vision")
        check_choice("vision.head", self.head, HEADS)

    @property
    def grid_size(self) -> int:
        """Return the side of the last stage's features."""
        return self.image_size // (STEM * HALVING ** (len(self.depths) - 1))


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, layer norm and an MLP, scaled and added to what came in."""

    norm_eps: float
    exec_config: ExecConfig

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Return features of the same shape."""
        width = x_BHWC.shape[-1]
        y_BHWC = DepthwiseConv(7, exec_config=self.exec_config, name="conv_dw")(x_BHWC)
        y_BHWC = LayerNorm(self.norm_eps, name="ln")(y_BHWC)
        y_BHWC = MLP(4 * width, "gelu", INIT, self.exec_config, name="mlp")(y_BHWC)
        return x_BHWC + LayerScale(1e-6, name="ls")(y_BHWC)


class ConvNeXtStage(nn.Module):
    """Blocks of one width, behind a norm and a halving of the resolution in all but the first."""

    width: int
    depth: int
    halves: bool
    norm_eps: float
    exec_config: ExecConfig

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Return the stage's features."""
        if self.halves:
            x_BHWC = LayerNorm(self.norm_eps, name="downsample_ln")(x_BHWC)
            x_BHWC = patches(x_BHWC, self.width, HALVING, self.exec_config, name="downsample_conv")
        block = remat_block(ConvNeXtBlock, self.exec_config)
        for i in range(self.depth):
            x_BHWC = block(self.norm_eps, self.exec_config, name=f"blocks_{i}")(x_BHWC)
        return x_BHWC


def patches(x_BHWC: Array, width: int, size: int, exec_config: ExecConfig, *, name: str) -> Array:
    """Return the projections of square patches in their places, [B, H / size, W / size, width]."""
    batch, height, columns = x_BHWC.shape[:3]
    x_BLD = PatchProjection(width, size, True, exec_config.dtype, name=name)(x_BHWC)
    return x_BLD.reshape(batch, height // size, columns // size, width)


class ConvNeXt(nn.Module):
    """The image tower: patches, stages, the mean of all places, a norm and a projection."""

    config: ConvNeXtConfig
    embed_dim: int
    exec_config: ExecConfig = DEFAULT_EXEC_CONFIG

    @nn.compact
    def __call__(
        self,
        images_BHWC: Float[Array, "B H W 3"],
        train: bool = False,
        valid_B: Bool[Array, " B"] | None = None,
        patch_ids_Bl: None = None,
    ) -> Float[Array, "B D"]:
        """Return features of normalized images, with the arguments of `VisionTransformer`."""
        del train, valid_B, patch_ids_Bl
        c = self.config
        x_BHWC = patches(images_BHWC, c.widths[0], STEM, self.exec_config, name="stem_conv")
        x_BHWC = LayerNorm(c.norm_eps, name="stem_ln")(x_BHWC)
        for i, (width, depth) in enumerate(zip(c.widths, c.depths, strict=True)):
            stage = ConvNeXtStage(
                width, depth, i > 0, c.norm_eps, self.exec_config, name=f"stages_{i}"
            )
            x_BHWC = stage(x_BHWC)
        x_BD = LayerNorm(c.norm_eps, name="ln_post")(jnp.mean(x_BHWC, axis=(1, 2)))
        if c.head == "mlp":
            hidden = nn.Dense(2 * self.embed_dim, dtype=self.exec_config.dtype, name="head_fc")
            x_BD = nn.gelu(hidden(x_BD), approximate=False)
        width = x_BD.shape[-1]
        projection_DD = self.param("proj", normal(width**-0.5), (width, self.embed_dim))
        return x_BD @ projection_DD.astype(x_BD.dtype)
