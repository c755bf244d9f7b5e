"""Tell the names of open_clip's arrays by a model's config, and by the names themselves."""

from collections.abc import Set

from clip_jax.errors import UserError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.convnext import ConvNeXtConfig
from clip_jax.models.fastvit import FastViTConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.vit import ViTConfig

# An array that a tower of timm has, and the key of `names.IMAGE_NAMINGS`; the first that is there.
_TRUNKS = (
    ("visual.trunk.blocks.0.attn.q_bias", "timm_eva"),
    ("visual.trunk.blocks.0.attn.q_proj.weight", "timm_eva02"),
    ("visual.trunk.blocks.0.attn.qkv.weight", "timm_vit"),
    ("visual.trunk.stages.0.blocks.0.conv_dw.weight", "convnext"),
    ("visual.trunk.stem.0.reparam_conv.weight", "fastvit"),
)
_MLP_HEAD = "visual.head.mlp.fc1.weight"  # open_clip's own, behind the tower
_TEXTS = (("text.token_embedding.weight", "nested"), ("token_embedding.weight", "flat"))


def trunk_naming(names: Set[str], where: str) -> str:
    """Return the key of `names.NAMINGS` of a file whose image tower is one of timm's.

    Raises:
      UserError: a tower is of a family that is not supported.
    """
    image = next((naming for marker, naming in _TRUNKS if marker in names), None)
    if image is None:
        raise UserError(f"{where}: its image tower is one of timm's that is not supported")
    text = next((naming for marker, naming in _TEXTS if marker in names), None)
    if text is None:
        raise UserError(f"{where}: its text tower is not one of CLIP's own, and not supported")
    if _MLP_HEAD in names:
        image += "_mlp"
    is_siglip = "visual.trunk.attn_pool.latent" in names and "visual.trunk.head.weight" not in names
    return "open_clip_siglip" if is_siglip and text == "nested" else f"{image}+{text}"


def config_naming(config: CLIPConfig) -> str:
    """Return the naming of open_clip's own module of this model."""
    vision = config.vision
    if isinstance(vision, ResNetConfig):
        return "openai_resnet"
    if isinstance(vision, ConvNeXtConfig):
        return f"convnext{'_mlp' if vision.head == 'mlp' else ''}+nested"
    if isinstance(vision, FastViTConfig):
        return "fastvit+nested"
    if not isinstance(vision, ViTConfig) or not is_timm(vision):
        return "openai"
    if not vision.project:
        return "open_clip_siglip"
    return f"{_vit_naming(vision)}+nested"


def is_timm(vision: ViTConfig) -> bool:
    """Return whether open_clip builds this image transformer by timm."""
    return vision.pool == "map" or vision.proj_bias


def _vit_naming(vision: ViTConfig) -> str:
    if vision.form is None or vision.form.key_bias:
        return "timm_vit"
    return "timm_eva" if vision.form.mlp == "plain" else "timm_eva02"
