"""The image towers, as a table: the config of each, its module, and its name in a work folder."""

from typing import NamedTuple

import flax.linen as nn

from clip_jax.models.convnet import ConvNet, ConvNetConfig
from clip_jax.models.convnext import ConvNeXt, ConvNeXtConfig
from clip_jax.models.fastvit import FastViT, FastViTConfig
from clip_jax.models.naflex import NaFlexConfig, NaFlexTransformer
from clip_jax.models.resnet import ModifiedResNet, ResNetConfig
from clip_jax.models.vit import VisionTransformer, ViTConfig

VisionConfig = (
    ViTConfig | ResNetConfig | ConvNetConfig | ConvNeXtConfig | FastViTConfig | NaFlexConfig
)


class ImageTower(NamedTuple):
    """One kind of image tower.

    Attributes:
      kind: its name in the `config.json` of a work folder.
      module: called with a config, `embed_dim` and how it is computed.
    """

    kind: str
    module: type[nn.Module]


IMAGE_TOWERS: dict[type[VisionConfig], ImageTower] = {
    ViTConfig: ImageTower("vit", VisionTransformer),
    ResNetConfig: ImageTower("resnet", ModifiedResNet),
    ConvNetConfig: ImageTower("convnet", ConvNet),
    ConvNeXtConfig: ImageTower("convnext", ConvNeXt),
    FastViTConfig: ImageTower("fastvit", FastViT),
    NaFlexConfig: ImageTower("naflex", NaFlexTransformer),
}
VISION_KINDS: dict[str, type[VisionConfig]] = {
    tower.kind: config for config, tower in IMAGE_TOWERS.items()
}
