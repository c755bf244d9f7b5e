"""The table of models in `docs/models.md`: a row of numbers for each entry of the zoo.

    python -m clip_jax.models.table docs/models.md

rewrites it between its two markers.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from clip_jax.models.clip import CLIP, CLIPConfig, variable_shapes
from clip_jax.models.convnet import ConvNetConfig
from clip_jax.models.convnext import ConvNeXtConfig
from clip_jax.models.fastvit import FastViTConfig
from clip_jax.models.flops import image_flops, text_flops
from clip_jax.models.image_towers import VisionConfig
from clip_jax.models.naflex import NaFlexConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.models.zoo import MODELS

START_MARKER = "<!-- written by: python -m clip_jax.models.table docs/models.md -->"
END_MARKER = "<!-- end of the table -->"
COLUMNS = (
    "model",
    "image, pixels",
    "caption, tokens",
    "image tower, M",
    "text tower, M",
    "GFLOP an image",
    "GFLOP a caption",
    "parity case",
)


def parity_case(config: CLIPConfig) -> str | None:
    """Return the parity tests' case that stands for a model; None where no reference has it."""
    vision, text = config.vision, config.text
    if text.encoder is not None:
        kind = "roberta" if text.encoder.norms == "after" else "nllb"
        return f"{kind} siglip" if isinstance(vision, ViTConfig) and vision.pool == "map" else kind
    if text.class_token:
        return "coca"
    if isinstance(vision, ConvNetConfig):
        return None
    if isinstance(vision, NaFlexConfig):
        return "naflex"
    if isinstance(vision, FastViTConfig):
        return f"fastvit {vision.norm}"
    if isinstance(vision, ConvNeXtConfig):
        return f"convnext {vision.head}"
    if isinstance(vision, ResNetConfig):
        return f"resnet {text.activation}"
    if vision.form is not None:
        return _form_case(vision)
    if vision.pool == "map":
        suffix = "" if text.project else " without projection"
        return f"siglip {vision.activation}/{text.activation}{suffix}"
    if vision.proj_bias:
        return "timm vit stem" if vision.patch_stages else "timm vit"
    kind = "clipa" if vision.pool == "average" else "vit"
    if text.pool == "end" and text.eot_id != text.vocab_size - 1:
        kind = "worldwide"
    return f"{kind} {text.activation}" + (" layer scale" if vision.layer_scale else "")


def _form_case(vision: ViTConfig) -> str:
    """Return the case of an image transformer whose blocks have a form of their own."""
    assert vision.form is not None
    if vision.mbconv_widths:
        return "vitamin" if vision.has_positions else "vitamin without positions"
    if vision.pool == "map":
        return "perception encoder" + ("" if vision.class_token else " without class token")
    if vision.form.rotary is not None:
        return "eva02"
    return "eva02 norms behind" if vision.form.norms == "behind" else "eva01"


def parameter_counts(config: CLIPConfig) -> tuple[int, int]:
    """Count the parameters of the image and of the text tower, by shapes alone."""
    embed_dim = config.embed_dim
    return _count_tower(config.vision, embed_dim), _count_tower(config.text, embed_dim)


@functools.cache
def _count_tower(tower: VisionConfig | TextConfig, embed_dim: int) -> int:
    """Count the parameters of one tower."""
    if isinstance(tower, ViTConfig | TextConfig):
        # The blocks are of one size: trace the first alone, and count it for each of the others.
        params = _tower_shapes(dataclasses.replace(tower, layers=1), embed_dim)
        block = params["transformer"]["resblocks_0"]
        return _count_tree(params) + (tower.layers - 1) * _count_tree(block)
    return _count_tree(_tower_shapes(tower, embed_dim))


def _tower_shapes(tower: VisionConfig | TextConfig, embed_dim: int) -> dict[str, Any]:
    """Return the shapes of one tower's parameters, in a model whose other tower is the smallest."""
    text = TextConfig(width=1, layers=1, heads=1, vocab_size=1, context_length=1)
    if isinstance(tower, TextConfig):
        name, config = "text", CLIPConfig(embed_dim, ConvNetConfig(8, 4, (1, 1)), tower)
    else:
        name, config = "visual", CLIPConfig(embed_dim, tower, text)
    return variable_shapes(CLIP(config))["params"][name]


def _count_tree(params: dict[str, Any]) -> int:
    """Count the parameters of a tree of shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def model_table() -> str:
    """Return the table, in the order of the zoo."""
    align = ["---", *["---:"] * 6, "---"]
    rows: list[Sequence[str]] = [COLUMNS, align]
    for name, config in MODELS.items():
        image, text = parameter_counts(config)
        length = config.text.context_length
        cells = [
            f"`{name}`",
            f"{config.vision.image_size}",
            f"{length}",
            f"{image / 1e6:.2f}",
            f"{text / 1e6:.2f}",
            f"{image_flops(config) / 1e9:.2f}",
            f"{text_flops(config, length) / 1e9:.2f}",
            parity_case(config) or "no reference",
        ]
        rows.append(cells)
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def update_table(document: str) -> str:
    """Return the document with the table between its two markers written anew."""
    before, rest = document.split(START_MARKER)
    _, after = rest.split(END_MARKER)
    return f"{before}{START_MARKER}\n{model_table()}{END_MARKER}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(update_table(path.read_text()))
