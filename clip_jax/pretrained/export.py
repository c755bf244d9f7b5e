"""Write a model as a folder that open_clip or transformers loads as it is, or as a work folder."""

import glob
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from clip_jax.errors import UserError, note
from clip_jax.files import check_local
from clip_jax.models.fastvit import FastViTConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.pretrained.hf_config import config_to_hf
from clip_jax.pretrained.layouts import export_arrays
from clip_jax.pretrained.open_clip_config import config_to_open_clip
from clip_jax.pretrained.open_clip_naming import config_naming
from clip_jax.pretrained.preprocess import preprocess_to_hf, preprocess_to_open_clip
from clip_jax.pretrained.work_folder import RunDescription, write_work_folder
from clip_jax.tokenizers.folder import write_clip_tokenizer

Arrays = Mapping[str, np.ndarray]

# Names that the libraries' modules hold with leading dimensions of one, and how many in all.
OPEN_CLIP_RANKS = {
    "visual.trunk.pos_embed": 3,
    "visual.trunk.cls_token": 3,
    "visual.trunk.attn_pool.latent": 3,
}
HF_SIGLIP_RANKS = {"vision_model.head.probe": 3, "logit_scale": 1, "logit_bias": 1}


def write_open_clip(folder: Path, description: RunDescription, arrays: Arrays) -> None:
    """Write `open_clip_model.safetensors` and `open_clip_config.json` in a folder that exists.

    `open_clip.create_model("local-dir:FOLDER")` loads them.

    Args:
      folder: where; it exists.
      description: the model, its tokenizer and its preprocessing.
      arrays: parameters and batch statistics by path, float32.

    Raises:
      UserError: open_clip has no such model.
    """
    config = description.model
    vision = config.vision
    if isinstance(vision, FastViTConfig) or (isinstance(vision, ViTConfig) and vision.patch_stages):
        raise UserError(
            "open_clip has this image tower with the branches that it was trained with, which are "
            "folded into single convolutions here; convert it to a work folder instead"
        )
    model_cfg = config_to_open_clip(config)
    tensors = with_ranks(export_arrays(arrays, config_naming(config)), OPEN_CLIP_RANKS)
    if isinstance(config.vision, ResNetConfig):
        # Batch norm counts its batches; a count changes nothing.
        tensors |= {
            key.replace("running_mean", "num_batches_tracked"): np.zeros((), np.int64)
            for key in tensors
            if key.endswith("running_mean")
        }
    preprocess_cfg = preprocess_to_open_clip(description.preprocess, config.vision.image_size)
    values = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    write_json(folder / "open_clip_config.json", values)
    save_file(tensors, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, description)


def write_hf(folder: Path, description: RunDescription, arrays: Arrays) -> None:
    """Write `model.safetensors`, `config.json`, `preprocessor_config.json` and the tokenizer.

    `transformers.CLIPModel.from_pretrained(FOLDER)` loads them, or `SiglipModel` a SigLIP.

    Args:
      folder: where; it exists.
      description: the model, its tokenizer and its preprocessing.
      arrays: parameters and batch statistics by path, float32.

    Raises:
      UserError: transformers has no such model.
    """
    values = config_to_hf(description.model)
    is_siglip = values["model_type"] == "siglip"
    if description.model.init_logit_bias is not None and not is_siglip:
        note("transformers' CLIPModel has no logit_bias: its logits lack what the file holds there")
    tensors = export_arrays(arrays, "hf_siglip" if is_siglip else "hf_clip")
    tensors = with_ranks(tensors, HF_SIGLIP_RANKS if is_siglip else {})
    image_size = description.model.vision.image_size
    write_json(folder / "config.json", values)
    preprocessor = preprocess_to_hf(description.preprocess, image_size)
    write_json(folder / "preprocessor_config.json", preprocessor)
    # transformers asks for the framework of the tensors.
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, description)


Writer = Callable[[Path, RunDescription, Arrays], None]
WRITERS: dict[str, Writer] = {
    "own": write_work_folder,
    "open_clip": write_open_clip,
    "hf": write_hf,
}


def write_tokenizer(folder: Path, description: RunDescription) -> None:
    """Write the tokenizer's files: CLIP's as Hugging Face has them, or any other's own file."""
    spec = description.tokenizer
    if spec is None:
        return
    if spec.kind == "clip":
        write_clip_tokenizer(folder, description.model.text.context_length)
    elif spec.file is not None:
        name = "tokenizer.json" if spec.kind == "huggingface" else "tokenizer.model"
        shutil.copyfile(spec.file, folder / name)


def with_ranks(arrays: Arrays, ranks: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Return the arrays, some with leading dimensions of one before them."""
    return {
        key: x.reshape((1,) * max(0, ranks.get(key, 0) - x.ndim) + x.shape)
        for key, x in arrays.items()
    }


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write one JSON file."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _remove_left(parent: Path, prefix: str) -> None:
    """Remove the folders of this beginning whose process, the number at the end, is no more."""
    for path in parent.glob(f"{glob.escape(prefix)}*"):
        number = path.name.removeprefix(prefix)
        if number.isdigit() and not _is_alive(int(number)):
            note(f"{path}, which a killed process has left, is removed")
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write to, which takes its name at the end: whole or not at all.

    What a process of this machine that was killed has left is removed.

    Raises:
      UserError: the folder holds something already, or cannot be written.
    """
    check_local({"the folder": folder})
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something already; delete it, or name another folder")
    parts = f"{folder.name}.part-{socket.gethostname()}-"
    _remove_left(folder.parent, parts)
    part = folder.with_name(f"{parts}{os.getpid()}")
    try:
        part.mkdir(parents=True)
        yield part
        if folder.is_dir():
            folder.rmdir()
        part.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
