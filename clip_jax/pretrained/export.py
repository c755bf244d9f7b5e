"""Our models in the formats of others: a folder that open_clip or transformers loads as it is.

And our own: the same folder as a run's, with the weights in one safetensors file.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from clip_jax.data.images import Preprocess
from clip_jax.data.preprocess import preprocess_to_hf, preprocess_to_open_clip
from clip_jax.errors import UserError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.pretrained.hf_config import config_to_hf
from clip_jax.pretrained.layouts import to_theirs
from clip_jax.pretrained.open_clip_config import config_to_open_clip

# Names that their modules hold with leading dimensions of one, and how many dimensions in all.
RANKS = {
    "visual.trunk.pos_embed": 3,
    "visual.trunk.attn_pool.latent": 3,
    "vision_model.head.probe": 3,
}
HF_SIGLIP_RANKS = {**RANKS, "logit_scale": 1, "logit_bias": 1}


def export_open_clip(
    folder: Path, config: CLIPConfig, arrays: Mapping[str, np.ndarray], preprocess: Preprocess
) -> None:
    """`open_clip_model.safetensors` and `open_clip_config.json`.

    `open_clip.create_model("local-dir:FOLDER")` loads them.

    Args:
      arrays: parameters and batch statistics by path, float32.

    Raises:
      UserError: open_clip has no such model.
    """
    model_cfg = config_to_open_clip(config)
    theirs = with_ranks(to_theirs(arrays, open_clip_naming(config)), RANKS)
    if isinstance(config.vision, ResNetConfig):
        # Batch norm counts its batches; a count changes nothing.
        theirs |= {
            key.replace("running_mean", "num_batches_tracked"): np.zeros((), np.int64)
            for key in theirs
            if key.endswith("running_mean")
        }
    values = {
        "model_cfg": model_cfg,
        "preprocess_cfg": preprocess_to_open_clip(preprocess, config.vision.image_size),
    }
    write_folder(folder, {"open_clip_config.json": values}, "open_clip_model.safetensors", theirs)


def open_clip_naming(config: CLIPConfig) -> str:
    """The naming that open_clip's own module of this model has."""
    if isinstance(config.vision, ResNetConfig):
        return "openai_resnet"
    is_siglip = isinstance(config.vision, ViTConfig) and config.vision.pool == "map"
    return "open_clip_siglip" if is_siglip else "openai"


def export_hf(
    folder: Path, config: CLIPConfig, arrays: Mapping[str, np.ndarray], preprocess: Preprocess
) -> None:
    """`model.safetensors`, `config.json` and `preprocessor_config.json`.

    `transformers.CLIPModel.from_pretrained(FOLDER)` loads them, or `SiglipModel` a SigLIP.

    Raises:
      UserError: transformers has no such model.
    """
    values = config_to_hf(config)
    is_siglip = values["model_type"] == "siglip"
    theirs = to_theirs(arrays, "hf_siglip" if is_siglip else "hf_clip")
    theirs = with_ranks(theirs, HF_SIGLIP_RANKS if is_siglip else {})
    files = {
        "config.json": values,
        "preprocessor_config.json": preprocess_to_hf(preprocess, config.vision.image_size),
    }
    write_folder(folder, files, "model.safetensors", theirs)


def with_ranks(arrays: Mapping[str, np.ndarray], ranks: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The arrays, some with leading dimensions of one before them."""
    return {
        key: x.reshape((1,) * max(0, ranks.get(key, 0) - x.ndim) + x.shape)
        for key, x in arrays.items()
    }


def write_folder(
    folder: Path,
    files: Mapping[str, Mapping[str, Any]],
    weights: str,
    arrays: Mapping[str, np.ndarray],
) -> None:
    """JSON files and one safetensors file in a folder that is made, whole or not at all.

    Raises:
      UserError: the folder holds something already, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something already; delete it, or name another folder")
    part = folder.with_name(folder.name + f".part-{os.getpid()}")
    try:
        part.mkdir(parents=True)
        for name, values in files.items():
            (part / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        # transformers asks for the framework of the tensors.
        save_file(dict(arrays), part / weights, metadata={"format": "pt"})
        if folder.is_dir():
            folder.rmdir()
        part.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
