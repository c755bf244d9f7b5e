"""A small convolutional image tower, for small images and little computing time.

Not one of CLIP's: the embedded emoji run uses it, because it learns most in a minute of a CPU.
A patch convolution, then 3x3 convolutions of stride 2, each with batch norm and ReLU; then one
projection of what is left, every place with weights of its own. In drawings that fill the frame
it matters what is where: the mean over the places names fewer of them right.
"""

import dataclasses

import flax.linen as nn
from jaxtyping import Array, Bool, Float

from clip_jax.models.batch_norm import ValidRows, valid_rows
from clip_jax.models.convolution import conv, normalized
from clip_jax.models.execution import DEFAULT_EXEC_CONFIG, ExecConfig, remat_block
from clip_jax.models.layers import LayerNorm, normal, torch_uniform
from clip_jax.models.sizes import check_sizes


@dataclasses.dataclass(frozen=True)
class ConvNetConfig:
    """The sizes of a convolutional tower.

    Attributes:
      image_size: side of the square input, pixels; patch_size times a power of two.
      patch_size: side and stride of the first convolution.
      features: of each convolution's output, the patches' first.
    """

    image_size: int
    patch_size: int
    features: tuple[int, ...]

    def __post_init__(self) -> None:
        check_sizes(self, "vision")

    @property
    def grid_size(self) -> int:
        """Return the side of the last convolution's output."""
        return self.image_size // self.patch_size // 2 ** (len(self.features) - 1)


class ConvNet(nn.Module):
    """An image tower of convolutions. It keeps running statistics in `batch_stats`."""

    config: ConvNetConfig
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
        """Return features of normalized images, with the arguments of `ModifiedResNet`."""
        del patch_ids_Bl
        rows = valid_rows(valid_B, self.exec_config.target)
        stage = remat_block(ConvNet._stage, self.exec_config, (2, 4))
        x_BHWD = images_BHWC
        for number in range(1, len(self.config.features) + 1):
            x_BHWD = stage(self, x_BHWD, number, rows, train)
        x_BD = LayerNorm(name="ln_post")(x_BHWD.reshape(x_BHWD.shape[0], -1))
        width = x_BD.shape[-1]
        projection_DD = self.param("proj", normal(width**-0.5), (width, self.embed_dim))
        return x_BD @ projection_DD.astype(x_BD.dtype)

    def _stage(self, x_BHWD: Array, number: int, rows: ValidRows | None, train: bool) -> Array:
        """Apply convolution `number`, of patches where it is 1, with its batch norm and ReLU."""
        features, dtype = self.config.features[number - 1], self.exec_config.dtype
        if number == 1:
            size = self.config.patch_size
            layer = nn.Conv(
                features,
                (size, size),
                strides=(size, size),
                padding=((0, 0), (0, 0)),
                use_bias=False,
                kernel_init=torch_uniform(3 * size * size),
                dtype=dtype,
                name="conv1",
            )
        else:
            fan_in = x_BHWD.shape[-1]
            name = f"conv{number}"
            layer = conv(features, 3, fan_in, stride=2, dtype=dtype, name=name)
        return normalized(
            layer,
            x_BHWD,
            rows,
            train=train,
            exec_config=self.exec_config,
            relu=True,
            name=f"bn{number}",
        )
