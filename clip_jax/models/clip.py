"""CLIP: two towers that meet only on a shared unit sphere (Radford et al. 2021, section 2)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from clip_jax.errors import UserError
from clip_jax.models.attention import Kernel, choose_kernel
from clip_jax.models.execution import ExecConfig, remat_tower
from clip_jax.models.image_towers import IMAGE_TOWERS, VisionConfig
from clip_jax.models.naflex import ImagePatches, NaFlexConfig
from clip_jax.models.resnet import HEAD_SIZE, ResNetConfig
from clip_jax.models.sizes import check_sizes
from clip_jax.models.stack import stack_layers
from clip_jax.models.target import ONE_CPU, Target
from clip_jax.models.text import PackedTokens, TextConfig, TextTransformer
from clip_jax.models.text_encoder import TextEncoder
from clip_jax.models.vit import ViTConfig

INITIAL_LOGIT_SCALE = float(np.log(1 / 0.07))  # section 2.5
UNIT_EPS = 1e-12  # the norm's floor, as torch.nn.functional.normalize has it


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """The sizes of a whole model: one entry of the zoo.

    Attributes:
      embed_dim: features of the shared space.
      vision, text: the towers.
      init_logit_scale: start of the stored logarithm of the scale.
      init_logit_bias: start of what the sigmoid loss adds to the logits; None makes no such
        parameter.
    """

    embed_dim: int
    vision: VisionConfig
    text: TextConfig
    init_logit_scale: float = INITIAL_LOGIT_SCALE
    init_logit_bias: float | None = None

    def __post_init__(self) -> None:
        check_sizes(self, "model")
        for name, tower in (("vision", self.vision), ("text", self.text)):
            # The other image towers always end on a projection.
            if not isinstance(tower, ViTConfig | NaFlexConfig | TextConfig) or tower.project:
                continue
            if tower.width != self.embed_dim:
                raise UserError(
                    f"{name}.project is False, so its width, {tower.width}, must equal embed_dim, "
                    f"{self.embed_dim}"
                )


def unit_length(z_BD: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Scale rows to unit length, in float32.

    >>> unit_length(jnp.array([[3.0, 4.0]]))
    Array([[0.6, 0.8]], dtype=float32)
    """
    z_BD = z_BD.astype(jnp.float32)
    # The square root's derivative at zero is infinite: keep a zero row away from it.
    square_B1 = jnp.sum(z_BD * z_BD, axis=-1, keepdims=True)
    return z_BD / jnp.sqrt(jnp.maximum(square_B1, UNIT_EPS**2))


class CLIP(nn.Module):
    """Both towers and the temperature.

    Attributes:
      config: the sizes.
      pool_last_block, dtype, attention, remat, scan, target: how it is computed; see `ExecConfig`.
    """

    config: CLIPConfig
    pool_last_block: bool = True
    dtype: DTypeLike = jnp.float32
    attention: str = "auto"
    remat: str = "none"
    scan: bool = False
    target: Target = ONE_CPU

    @property
    def exec_config(self) -> ExecConfig:
        """Return how both towers are computed."""
        return ExecConfig(
            pool_last_block=self.pool_last_block,
            dtype=self.dtype,
            attention=self.attention,
            remat=self.remat,
            scan=self.scan,
            target=self.target,
        )

    def setup(self) -> None:
        c = self.config
        self.visual = self._image_tower()
        module = TextTransformer if c.text.encoder is None else TextEncoder
        text = remat_tower(module, self.exec_config)
        self.text = text(c.text, c.embed_dim, self.exec_config)
        constant = nn.initializers.constant
        self.logit_scale = self.param("logit_scale", constant(c.init_logit_scale), ())
        if c.init_logit_bias is not None:
            self.logit_bias = self.param("logit_bias", constant(c.init_logit_bias), ())

    def _image_tower(self) -> nn.Module:
        """Return the image tower of the config's kind."""
        c = self.config
        module = IMAGE_TOWERS[type(c.vision)].module
        tower = remat_tower(module, self.exec_config, static_argnums=(2,))
        return tower(c.vision, c.embed_dim, self.exec_config)

    def encode_image(
        self,
        images_BHWC: Float[Array, "B H W 3"] | ImagePatches,
        train: bool = False,
        valid_B: Bool[Array, " B"] | None = None,
        patch_ids_Bl: Int[Array, "B l"] | None = None,
        path_scale_BK2: Float[Array, "B K 2"] | None = None,
    ) -> Float[Array, "B D"]:
        """Return image features, not of unit length.

        Args:
          images_BHWC: normalized images; or patches of them, where the tower takes those.
          train: batch norms use the statistics of the batch.
          valid_B: False leaves a row out of the batch statistics; None takes all.
          patch_ids_Bl: the numbers of the patches that an image transformer sees of each image;
            None is all. The class token always stays.
          path_scale_BK2: factors of both branches of each block of an image transformer.
        """
        paths = () if path_scale_BK2 is None else (path_scale_BK2,)
        return self.visual(images_BHWC, train, valid_B, patch_ids_Bl, *paths)

    def encode_text(
        self,
        tokens_BL: Int[Array, "B L"] | PackedTokens,
        path_scale_BK2: Float[Array, "B K 2"] | None = None,
    ) -> Float[Array, "B D"]:
        """Return text features, not of unit length; for `path_scale_BK2` see `encode_image`."""
        return self.text(tokens_BL, *(() if path_scale_BK2 is None else (path_scale_BK2,)))

    def __call__(
        self,
        images_BHWC: Float[Array, "B H W 3"],
        tokens_TL: Int[Array, "T L"] | PackedTokens,
        train: bool = False,
        valid_B: Bool[Array, " B"] | None = None,
        patch_ids_Bl: Int[Array, "B l"] | None = None,
        path_scale_BK2: Float[Array, "B K 2"] | None = None,
        text_path_scale_TM2: Float[Array, "T M 2"] | None = None,
    ) -> tuple[Float[Array, "B D"], Float[Array, "T D"]]:
        """Return image and text features of unit length, float32; see `encode_image`.

        There may be more texts than images.
        """
        z_image_BD = self.encode_image(images_BHWC, train, valid_B, patch_ids_Bl, path_scale_BK2)
        return unit_length(z_image_BD), unit_length(
            self.encode_text(tokens_TL, text_path_scale_TM2)
        )


def unrolled(model: CLIP) -> CLIP:
    """Return the model with every block's parameters by themselves; `stack_layers` leads back."""
    return model.clone(scan=False)


def init_variables(model: CLIP, seed: int) -> dict[str, Any]:
    """Draw parameters (and batch statistics) by the paper's initialization; it can be traced."""
    size, length = model.config.vision.image_size, model.config.text.context_length
    images_BHWC = jnp.zeros((1, size, size, 3))
    tokens_BL = jnp.zeros((1, length), jnp.int32)
    # A flax loop draws other numbers for its layers than the layers by themselves.
    plain = unrolled(model).clone(target=ONE_CPU, attention="xla")
    variables = dict(plain.init(jax.random.key(seed), images_BHWC, tokens_BL))
    return stack_layers(variables) if model.scan else variables


def variable_shapes(model: CLIP) -> dict[str, Any]:
    """Return the shapes of a model's variables, without allocating any."""
    return jax.eval_shape(lambda: init_variables(model, 0))


@dataclasses.dataclass(frozen=True)
class AttentionKernels:
    """The kernels of both towers' attention; None for an image tower that has no attention."""

    image: Kernel | None
    text: Kernel


def choose_kernels(model: CLIP, num_patches: int | None = None) -> AttentionKernels:
    """Return the kernels of both towers on the model's target.

    `num_patches`: how many are seen of an image; None is all.

    Raises:
      UserError: a tower cannot have the kernel that the model asks for.
    """

    def kernel(heads: int, head_size: int, queries: int, keys: int) -> Kernel:
        sizes = {"heads": heads, "head_size": head_size, "queries": queries, "keys": keys}
        return choose_kernel(model.attention, model.target, dtype=model.dtype, **sizes)

    vision, text = model.config.vision, model.config.text
    image = None
    if isinstance(vision, ResNetConfig):
        image = kernel(vision.heads, HEAD_SIZE, 1, vision.grid_size**2 + 1)
    if isinstance(vision, ViTConfig):
        length = vision.length if num_patches is None else num_patches + vision.class_token
        image = kernel(vision.heads, vision.width // vision.heads, length, length)
    length = text.context_length
    return AttentionKernels(image, kernel(text.heads, text.width // text.heads, length, length))
