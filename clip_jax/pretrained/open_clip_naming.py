"""Tell the names of open_clip's arrays by a model's config, and by the names themselves."""

from collections.abc import Set

from clip_jax.errors import UserError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.convnext import ConvNeXtConfig
from clip_jax.models.fastvit import FastViTConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.pretrained.names import NAMINGS

# An array that a tower has, and its key of `names.IMAGE_NAMINGS` or `names.TEXT_NAMINGS`; the first
# that is there.
_IMAGES = (
    ("visual.trunk.blocks.0.attn.q_bias", "timm_eva"),
    ("visual.trunk.blocks.0.attn.q_proj.weight", "timm_eva02"),
    ("visual.trunk.blocks.0.mlp.w0.weight", "vitamin"),
    ("visual.trunk.blocks.0.attn.qkv.weight", "timm_vit"),
    ("visual.trunk.stages.0.blocks.0.conv_dw.weight", "convnext"),
    ("visual.trunk.stem.0.reparam_conv.weight", "fastvit"),
    ("visual.layer1.0.conv1.weight", "resnet"),
    ("visual.conv1.weight", "openai"),
)
_TEXTS = (
    ("text.transformer.embeddings.token_type_embeddings.weight", "roberta"),
    ("text.transformer.embed_tokens.weight", "nllb"),
    ("text.cls_emb", "coca"),
    ("text.token_embedding.weight", "nested"),
    ("token_embedding.weight", "flat"),
)
_MLP_HEAD = "visual.head.mlp.fc1.weight"  # open_clip's own, behind the tower
# Both towers as open_clip has them without timm or transformers, and SigLIP.
_OLDER = {
    "openai+flat": "openai",
    "resnet+flat": "openai_resnet",
    "openai+nested": "open_clip_nested",
    "resnet+nested": "open_clip_nested_resnet",
}


def find_open_clip_naming(names: Set[str], where: str) -> str:
    """Return the key of `names.NAMINGS` of a file with open_clip's names.

    Raises:
      UserError: a tower is of a family that is not supported.
    """
    image = next((naming for marker, naming in _IMAGES if marker in names), None)
    if image is None and any(name.startswith("visual.trunk.") for name in names):
        raise UserError(f"{where}: its image tower is one of timm's that is not supported")
    if image is None:
        raise UserError(
            f"{where}: its {len(names)} arrays are not those of a CLIP in a known format; the "
            f"first is {min(names, default='none')}"
        )
    text = next((naming for marker, naming in _TEXTS if marker in names), None)
    if text is None:
        raise UserError(f"{where}: its text tower is not one of CLIP's own, and not supported")
    if _MLP_HEAD in names:
        image += "_mlp"
    is_siglip = "visual.trunk.attn_pool.latent" in names and "visual.trunk.head.weight" not in names
    if is_siglip and text == "nested":
        return "open_clip_siglip"
    naming = _OLDER.get(f"{image}+{text}", f"{image}+{text}")
    if naming not in NAMINGS:
        raise UserError(f"{where}: {_MLP_HEAD} belongs to ConvNeXt, and its image tower is another")
    return naming


def config_naming(config: CLIPConfig) -> str:
    """Return the naming of open_clip's own module of this model."""
    image, text = _image_naming(config), _text_naming(config)
    vision = config.vision
    if isinstance(vision, ViTConfig) and vision.pool == "map" and not vision.project:
        return "open_clip_siglip" if text == "plain" else f"{image}+{text}"
    if text == "plain":
        text = "flat" if image in ("openai", "resnet") else "nested"
    return _OLDER.get(f"{image}+{text}", f"{image}+{text}")


def is_timm(vision: ViTConfig) -> bool:
    """Return whether open_clip builds this image transformer by timm."""
    return vision.pool == "map" or vision.proj_bias or bool(vision.mbconv_widths)


def _image_naming(config: CLIPConfig) -> str:
    vision = config.vision
    if isinstance(vision, ResNetConfig):
        return "resnet"
    if isinstance(vision, ConvNeXtConfig):
        return "convnext_mlp" if vision.head == "mlp" else "convnext"
    if isinstance(vision, FastViTConfig):
        return "fastvit"
    if not isinstance(vision, ViTConfig) or not is_timm(vision):
        return "openai"
    if vision.mbconv_widths:
        return "vitamin"
    if vision.form is None or vision.form.key_bias:
        return "timm_vit"
    return "timm_eva" if vision.form.mlp == "plain" else "timm_eva02"


def _text_naming(config: CLIPConfig) -> str:
    text = config.text
    if text.encoder is not None:
        return "roberta" if text.encoder.norms == "after" else "nllb"
    return "coca" if text.class_token else "plain"
