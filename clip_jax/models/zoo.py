"""Every model by name: one row each, as a table to read."""

from clip_jax.errors import UserError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.convnet import ConvNetConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

TEXT_512 = TextConfig(width=512, layers=12, heads=8)
TEXT_640 = TextConfig(width=640, layers=12, heads=10)
TEXT_768 = TextConfig(width=768, layers=12, heads=12)
TEXT_1024 = TextConfig(width=1024, layers=12, heads=16)

# Sizes of the nine published models: Radford et al. 2021, tables 19 and 20.
MODELS: dict[str, CLIPConfig] = {
    "RN50": CLIPConfig(1024, ResNetConfig(224, (3, 4, 6, 3), 64), TEXT_512),
    "RN101": CLIPConfig(512, ResNetConfig(224, (3, 4, 23, 3), 64), TEXT_512),
    "RN50x4": CLIPConfig(640, ResNetConfig(288, (4, 6, 10, 6), 80), TEXT_640),
    "RN50x16": CLIPConfig(768, ResNetConfig(384, (6, 8, 18, 8), 96), TEXT_768),
    "RN50x64": CLIPConfig(1024, ResNetConfig(448, (3, 15, 36, 10), 128), TEXT_1024),
    "ViT-B/32": CLIPConfig(512, ViTConfig(224, 32, 768, 12, 12), TEXT_512),
    "ViT-B/16": CLIPConfig(512, ViTConfig(224, 16, 768, 12, 12), TEXT_512),
    "ViT-L/14": CLIPConfig(768, ViTConfig(224, 14, 1024, 24, 16), TEXT_768),
    "ViT-L/14@336px": CLIPConfig(768, ViTConfig(336, 14, 1024, 24, 16), TEXT_768),
    # ViT-S (Touvron et al. 2021, DeiT, table 1) with open_clip's text tower of the same width.
    "ViT-S/16": CLIPConfig(
        384,
        ViTConfig(224, 16, 384, 12, 6, activation="gelu"),
        TextConfig(width=384, layers=12, heads=6, activation="gelu"),
    ),
    # For small pictures on a CPU, such as the embedded emoji.
    "ConvNet-48": CLIPConfig(
        256,
        ConvNetConfig(48, 4, (64, 128, 256)),
        TextConfig(width=128, layers=1, heads=2, context_length=24),
    ),
}


def list_models() -> list[str]:
    """The names `model_config` knows."""
    return list(MODELS)


def model_config(name: str) -> CLIPConfig:
    """The sizes of a model by its name.

    Raises:
      UserError: no model has that name.
    """
    if name not in MODELS:
        raise UserError(f"no model is called {name!r}; known are: {', '.join(MODELS)}")
    return MODELS[name]
