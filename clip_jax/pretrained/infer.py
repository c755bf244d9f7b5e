"""Infer the model in a file of weights from the names and shapes of its arrays alone.

Shapes give every size but two: the number of heads and the activation. OpenAI's own files settle
both (64 features a head, QuickGELU); for others the zoo is searched for models of these sizes.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from clip_jax.errors import UserError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.convnet import ConvNetConfig
from clip_jax.models.image_towers import IMAGE_TOWERS
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.models.zoo import MODELS
from clip_jax.pretrained.layouts import has_arrays
from clip_jax.pretrained.open_clip_naming import config_naming, find_open_clip_naming
from clip_jax.pretrained.siglip import SIGLIP_LOGIT_SCALE, siglip_vit
from clip_jax.pretrained.trees import array_shapes

Arrays = Mapping[str, np.ndarray]


class Signature(NamedTuple):
    """The sizes of a model that names and shapes give.

    Attributes:
      kind: of the image tower: "vit", "resnet" or "siglip".
      width, layers, positions: of the image tower; `layers` are those of each of its stages.
      patch: side of a patch, pixels; 0 for a ResNet.
      embed_dim: of the shared space.
      text_width, text_layers, vocab_size, context_length: of the text tower.
    """

    kind: str
    width: int
    layers: tuple[int, ...]
    positions: int
    patch: int
    embed_dim: int
    text_width: int
    text_layers: int
    vocab_size: int
    context_length: int


def find_naming(arrays: Iterable[str], where: str) -> str:
    """Return the key of `names.NAMINGS` that these names follow.

    Raises:
      UserError: they follow none, or belong to a family that is not supported.
    """
    names = set(arrays)
    for key, naming in (
        ("vision_model.head.probe", "hf_siglip"),
        ("visual_projection.weight", "hf_clip"),
        ("params/img/embedding/kernel", "big_vision"),
    ):
        if key in names:
            return naming
    return find_open_clip_naming(names, where)


def read_signature(arrays: Arrays, naming: str, where: str) -> Signature:
    """Return the sizes of a model under OpenAI's or open_clip's names.

    Raises:
      UserError: an array that gives a size is missing.
    """
    text = "text." if naming.startswith("open_clip") else ""
    try:
        vocab_size, text_width = arrays[f"{text}token_embedding.weight"].shape
        context_length = arrays[f"{text}positional_embedding"].shape[0]
        text_layers = _count_blocks(arrays, rf"{re.escape(text)}transformer\.resblocks\.(\d+)\.")
        if f"{text}text_projection.weight" in arrays:
            embed_dim = arrays[f"{text}text_projection.weight"].shape[0]
        elif f"{text}text_projection" in arrays:
            embed_dim = arrays[f"{text}text_projection"].shape[1]
        else:
            embed_dim = text_width
        image = _image_signature(arrays, naming)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{where}: {error} is missing or has a shape no CLIP has") from None
    return Signature(*image, embed_dim, text_width, text_layers, vocab_size, context_length)


def _image_signature(arrays: Arrays, naming: str) -> tuple[str, int, tuple[int, ...], int, int]:
    if naming.endswith("resnet"):
        layers = tuple(_count_blocks(arrays, rf"visual\.layer{i}\.(\d+)\.") for i in range(1, 5))
        width = arrays["visual.layer1.0.conv1.weight"].shape[0]
        positions = arrays["visual.attnpool.positional_embedding"].shape[0]
        return "resnet", width, layers, positions, 0
    if naming == "open_clip_siglip":
        width, _, patch, _ = arrays["visual.trunk.patch_embed.proj.weight"].shape
        depth = _count_blocks(arrays, r"visual\.trunk\.blocks\.(\d+)\.")
        return "siglip", width, (depth,), arrays["visual.trunk.pos_embed"].shape[1], patch
    width, _, patch, _ = arrays["visual.conv1.weight"].shape
    depth = _count_blocks(arrays, r"visual\.transformer\.resblocks\.(\d+)\.")
    return "vit", width, (depth,), arrays["visual.positional_embedding"].shape[0], patch


def _count_blocks(names: Iterable[str], pattern: str) -> int:
    """Return how many different numbers the pattern's group matches at the start of the names."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def config_signature(config: CLIPConfig) -> Signature:
    """Return the same sizes of a config; no file holds the `kind` "convnet"."""
    v, t = config.vision, config.text
    image: tuple[str, int, tuple[int, ...], int, int]
    if isinstance(v, ViTConfig):
        kind = "siglip" if v.pool == "map" else "vit"
        image = (kind, v.width, (v.layers,), v.length, v.patch_size)
    elif isinstance(v, ResNetConfig):
        image = ("resnet", v.width, tuple(v.layers), v.grid_size**2 + 1, 0)
    elif not isinstance(v, ConvNetConfig):
        # Such a file's model is found by all of its shapes.
        image = (IMAGE_TOWERS[type(v)].kind, 0, (), v.grid_size**2, 0)
    else:
        image = ("convnet", v.features[-1], (len(v.features),), v.grid_size**2, v.patch_size)
    return Signature(*image, config.embed_dim, t.width, t.layers, t.vocab_size, t.context_length)


def openai_config(sizes: Signature) -> CLIPConfig:
    """Return the model of an OpenAI file: heads of 64 features, QuickGELU (`clip/model.py`)."""
    grid = round((sizes.positions - 1) ** 0.5)
    vision: ViTConfig | ResNetConfig
    if sizes.kind == "resnet":
        one, two, three, four = sizes.layers
        vision = ResNetConfig(32 * grid, (one, two, three, four), sizes.width)
    else:
        (layers,) = sizes.layers
        vision = ViTConfig(grid * sizes.patch, sizes.patch, sizes.width, layers, sizes.width // 64)
    text = TextConfig(
        width=sizes.text_width,
        layers=sizes.text_layers,
        heads=sizes.text_width // 64,
        context_length=sizes.context_length,
        vocab_size=sizes.vocab_size,
        eot_id=sizes.vocab_size - 1,
    )
    return CLIPConfig(sizes.embed_dim, vision, text)


def matching_models(sizes: Signature) -> dict[str, CLIPConfig]:
    """Return the zoo's models of these sizes, one name for each different config."""
    models: dict[str, CLIPConfig] = {}
    for name, config in MODELS.items():
        if config_signature(config) == sizes and config not in models.values():
            models[name] = config
    return models


def nearest_model(sizes: Signature) -> str:
    """Return the name in the zoo with most of the sizes equal."""

    def equal(name: str) -> int:
        return sum(a == b for a, b in zip(config_signature(MODELS[name]), sizes, strict=True))

    return max(MODELS, key=equal)


def zoo_config(sizes: Signature, where: str) -> CLIPConfig:
    """Return the one model of the zoo with these sizes.

    Raises:
      UserError: there is none, or several that only their activation or heads tell apart.
    """
    models = matching_models(sizes)
    if not models:
        raise UserError(
            f"{where}: no registered model has its sizes; the nearest is {nearest_model(sizes)}"
        )
    if len(models) > 1:
        raise UserError(
            f"{where}: weights do not say which activation they were trained with; give "
            f"model= one of {', '.join(models)}"
        )
    return next(iter(models.values()))


def model_of_arrays(arrays: Arrays, naming: str, where: str) -> str:
    """Return the one model of the zoo that has these arrays, for towers without a `Signature`.

    Raises:
      UserError: there is none, or several: an image size need not show in any shape.
    """
    # A text tower of CLIP's own has two forms of names.
    plain = naming.removesuffix("flat").removesuffix("nested")
    # One name for each different config.
    configs = {config: name for name, config in reversed(MODELS.items())}
    names = [
        name
        for config, name in configs.items()
        if config_naming(config).removesuffix("nested") == plain
        and has_arrays(arrays, array_shapes(config), naming)
    ]
    if not names:
        raise UserError(f"{where}: no registered model has these arrays; give model= and its name")
    if len(names) > 1:
        raise UserError(
            f"{where}: weights do not say which model they are of; give model= one of "
            f"{', '.join(sorted(names))}"
        )
    return names[0]


def big_vision_config(arrays: Arrays, where: str) -> CLIPConfig:
    """Return the SigLIP in a big_vision file, whose shapes give the heads too.

    Raises:
      UserError: an array that gives a size is missing, or the grid is not square.
    """
    image, text = "params/img/Transformer/encoderblock_0", "params/txt/Encoder_0/encoderblock_0"
    query = "MultiHeadDotProductAttention_0/query/kernel"
    try:
        patch, _, _, width = arrays["params/img/embedding/kernel"].shape
        grid = round(arrays["params/img/pos_embedding"].shape[-2] ** 0.5)
        heads = arrays[f"{image}/{query}"].shape[1]
        hidden = arrays[f"{image}/MlpBlock_0/Dense_0/kernel"].shape[1]
        vocab_size, text_width = arrays["params/txt/Embed_0/embedding"].shape
        text_hidden = arrays[f"{text}/MlpBlock_0/Dense_0/kernel"].shape[1]
        vision = siglip_vit(
            grid * patch,
            patch,
            width,
            _count_blocks(arrays, r"params/img/Transformer/encoderblock_(\d+)/"),
            heads,
            mlp_ratio=hidden / width,
            activation="gelu_tanh",
        )
        text_config = TextConfig(
            width=text_width,
            layers=_count_blocks(arrays, r"params/txt/Encoder_0/encoderblock_(\d+)/"),
            heads=arrays[f"{text}/{query}"].shape[1],
            context_length=arrays["params/txt/pos_embedding"].shape[-2],
            vocab_size=vocab_size,
            eot_id=1,
            mlp_ratio=text_hidden / text_width,
            activation="gelu_tanh",
            norm_eps=1e-6,
            causal=False,
            pool="last",
            project="params/txt/head/kernel" in arrays,
            proj_bias="params/txt/head/bias" in arrays,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{where}: {error} is missing or has a shape no SigLIP has") from None
    bias = -10.0 if "params/b" in arrays else None
    return CLIPConfig(width, vision, text_config, SIGLIP_LOGIT_SCALE, bias)
