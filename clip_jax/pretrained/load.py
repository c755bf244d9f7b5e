"""A published checkpoint, in whatever format, as our own arrays and what belongs to them.

What belongs to weights travels with them: activation, preprocessing, tokenizer. Nothing of a file
is executed, and no part of a model is returned where another is wrong.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clip_jax.data.images import OPENAI, SIGLIP, Preprocess
from clip_jax.errors import UserError, short
from clip_jax.models.clip import CLIP, CLIPConfig, init_variables
from clip_jax.models.convnet import ConvNetConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.models.zoo import GEMMA, model_config
from clip_jax.pretrained import infer
from clip_jax.pretrained.hf_config import config_from_hf
from clip_jax.pretrained.layouts import to_ours
from clip_jax.pretrained.npz_file import read_npz
from clip_jax.pretrained.open_clip_config import config_from_open_clip
from clip_jax.pretrained.preprocess import preprocess_from_hf, preprocess_from_open_clip
from clip_jax.pretrained.resize import (
    extend_text_positions,
    resize_image_positions,
    resize_text_positions,
)
from clip_jax.pretrained.safetensors_file import read_safetensors
from clip_jax.pretrained.tags import family_preprocess, find_pretrained
from clip_jax.pretrained.torch_file import read_torch
from clip_jax.tokenizers.folder import tokenizer_from_folder
from clip_jax.tokenizers.spec import TokenizerSpec
from clip_jax.typing import path_name

Arrays = Mapping[str, np.ndarray]

OPEN_CLIP_CONFIG, HF_CONFIG = "open_clip_config.json", "config.json"
# In a folder, the first of these that is there holds the weights.
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
HF_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
CLIP_VOCABULARY = 49_408
TORCH_ENDINGS = (".pt", ".pth", ".bin", ".ckpt")
# What a training run or a compiler puts before every name.
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")
# Buffers that OpenAI's archives keep, and no other file does.
_OPENAI_MARKS = {"input_resolution", "context_length", "vocab_size"}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model as it was published.

    Attributes:
      name: the registered model, or the file's.
      config: its sizes, activation and all.
      arrays: for each path of the parameter tree, a function that reads its array, float32.
      preprocess: how its images are made.
      tokenizer: the one it was trained with; None where its files are not there.
    """

    name: str
    config: CLIPConfig
    arrays: dict[str, Callable[[], np.ndarray]]
    preprocess: Preprocess
    tokenizer: TokenizerSpec | None


# Tracing a deep model takes half a second.
@functools.lru_cache(maxsize=16)
def array_shapes(config: CLIPConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and batch statistic, by its path; allocates nothing."""
    shapes = jax.eval_shape(lambda: init_variables(CLIP(config), 0))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return {path_name(path[1:]): leaf.shape for path, leaf in leaves}


def read_checkpoint(path: str | Path, model: str | None = None) -> Checkpoint:
    """Read a file or folder of OpenAI, open_clip, Hugging Face or big_vision.

    Args:
      path: `.pt`, `.bin`, `.safetensors` or `.npz`, or a folder with a config beside its weights.
      model: a name of `list_models()`, or "name:tag" of open_clip's pretrained list. Needed where
        a file does not say it; an OpenAI file keeps its own activation under any name.

    Raises:
      UserError: the file cannot be read, is damaged, or holds another model.
    """
    path = Path(path)
    if path.is_dir():
        if (path / OPEN_CLIP_CONFIG).is_file():
            return _from_open_clip_folder(path)
        if (path / HF_CONFIG).is_file():
            return _from_hf_folder(path)
        raise UserError(
            f"{path} holds no checkpoint: neither {OPEN_CLIP_CONFIG} nor {HF_CONFIG} is there"
        )
    if not path.exists():
        raise UserError(f"{path} does not exist; give a checkpoint's file or folder")
    beside = path.parent / OPEN_CLIP_CONFIG
    if model is None and path.name in OPEN_CLIP_WEIGHTS and beside.is_file():
        return _from_open_clip_folder(path.parent)
    if model is None and path.name in HF_WEIGHTS and (path.parent / HF_CONFIG).is_file():
        return _from_hf_folder(path.parent)
    return _from_file(path, model)


def read_arrays(path: Path) -> Arrays:
    """The arrays of one file, by the names it has for them, wrappers' prefixes removed."""
    ending = path.suffix.lower()
    if ending == ".npz":
        return unstack(read_npz(path))
    if ending == ".safetensors" or path.name.endswith(".safetensors.index.json"):
        arrays = read_safetensors(path)
    elif ending in TORCH_ENDINGS:
        arrays = read_torch(path)
    else:
        raise UserError(f"{path}: give a .pt, .bin, .safetensors or .npz file, or a folder")
    made = {_WRAPPERS.sub("", name): array for name, array in arrays.items()}
    if len(made) < len(arrays):
        raise UserError(f"{path}: it has some arrays twice, with and without `module.` before them")
    return made


def unstack(arrays: Arrays) -> Arrays:
    """Layers that big_vision scanned over, `encoderblock/...` [layers, ...], one by one."""
    made = {}
    for name, array in arrays.items():
        before, found, after = name.partition("/encoderblock/")
        if not found:
            made[name] = array
        else:
            made |= {f"{before}/encoderblock_{i}/{after}": row for i, row in enumerate(array)}
    # Checkpoints of a whole training state keep the optimizer's beside the parameters.
    return {name: array for name, array in made.items() if not name.startswith("opt/")}


def _from_file(path: Path, model: str | None) -> Checkpoint:
    arrays = read_arrays(path)
    naming = infer.find_naming(arrays, str(path))
    if naming.startswith("hf_"):
        raise UserError(f"{path}: weights of Hugging Face need their {HF_CONFIG}; give the folder")
    if naming == "big_vision":
        config = infer.big_vision_config(arrays, str(path))
        return _finish(path.stem, config, arrays, naming, SIGLIP, path)
    found = infer.signature(arrays, naming, str(path))
    name, preprocess = model or path.stem, OPENAI
    if arrays.keys() & _OPENAI_MARKS:
        config = infer.openai_config(found)
    elif model is None:
        config, preprocess = infer.zoo_config(found, str(path)), _preprocess_of(found)
    else:
        name, preprocess = _asked_for(model)
        config = model_config(name)
    return _finish(name, config, arrays, naming, preprocess, path, found=found)


def _preprocess_of(found: infer.Signature) -> Preprocess:
    """The family's, where no name was given."""
    return family_preprocess(next(iter(infer.matching_models(found))))


def _asked_for(model: str) -> tuple[str, Preprocess]:
    """The zoo's name and the preprocessing that "name" or "name:tag" stands for."""
    name, colon, tag = model.partition(":")
    if not colon:
        return name, family_preprocess(name)
    found = find_pretrained(name, tag)
    if found is None:
        raise UserError(
            f"model {model!r}: open_clip has no such pretrained pair that can be loaded here; "
            "see clip_jax.list_pretrained()"
        )
    return found


def _finish(
    name: str,
    config: CLIPConfig,
    arrays: Arrays,
    naming: str,
    preprocess: Preprocess,
    path: Path,
    tokenizer: TokenizerSpec | None = None,
    *,
    found: infer.Signature | None = None,
) -> Checkpoint:
    about = f"{path} does not hold a {name}"
    try:
        ours = to_ours(arrays, array_shapes(config), naming, about)
    except UserError as error:
        if found is None or infer.signature_of(config) == found:
            raise
        raise UserError(f"{error}; its sizes are nearest to {infer.nearest_model(found)}") from None
    if tokenizer is None and tokenizer_family(config) == "clip":
        tokenizer = TokenizerSpec()
    return Checkpoint(name, config, ours, preprocess, tokenizer)


def resized(
    checkpoint: Checkpoint,
    image_size: int | None,
    context_length: int | None,
    *,
    grow_text: bool = False,
) -> Checkpoint:
    """The checkpoint for images or captions of another size, its positions interpolated.

    As open_clip does it: bicubic over the grid of patches, linear over the text. Longer texts are
    for training on: a tower that is causal and read at the end token keeps the positions it has
    and gets more behind them.

    Args:
      checkpoint: as it was published.
      image_size, context_length: wanted; None keeps the checkpoint's.
      grow_text: texts may become longer.

    Raises:
      UserError: the size is not a multiple of the patch, or the text would grow.
    """
    vision, text = checkpoint.config.vision, checkpoint.config.text
    arrays = dict(checkpoint.arrays)
    if image_size is not None and image_size != vision.image_size:
        if isinstance(vision, ConvNetConfig):
            raise UserError(f"{checkpoint.name} takes images of {vision.image_size} pixels alone")
        step = vision.patch_size if isinstance(vision, ViTConfig) else 32
        if image_size < step or (isinstance(vision, ResNetConfig) and image_size % step):
            raise UserError(f"image_size {image_size} is not a multiple of {step} pixels")
        old, vision = vision, dataclasses.replace(vision, image_size=image_size)
        is_vit = isinstance(vision, ViTConfig)
        path = f"visual/{'' if is_vit else 'attnpool/'}positional_embedding"
        prefix = int(vision.class_token) if isinstance(vision, ViTConfig) else 1
        read = arrays[path]
        arrays[path] = lambda: resize_image_positions(
            read(), (old.grid_size,) * 2, (vision.grid_size,) * 2, prefix
        )
    if context_length is not None and context_length != text.context_length:
        if context_length < 2 or (context_length > text.context_length and not grow_text):
            raise UserError(
                f"context_length {context_length} is not between 2 and the checkpoint's "
                f"{text.context_length}"
            )
        read_text = arrays["text/positional_embedding"]
        grows = context_length > text.context_length
        fit = extend_text_positions if grows and text.supports_trimming else resize_text_positions
        text = dataclasses.replace(text, context_length=context_length)
        arrays["text/positional_embedding"] = lambda: fit(read_text(), context_length)
    config = dataclasses.replace(checkpoint.config, vision=vision, text=text)
    return dataclasses.replace(checkpoint, config=config, arrays=arrays)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      UserError: it cannot be read or is no object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({short(error)})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object")
    return values


def _weights(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} has a config but no weights: none of {', '.join(names)} is there")


def _from_open_clip_folder(folder: Path) -> Checkpoint:
    path = folder / OPEN_CLIP_CONFIG
    values = read_json(path)
    if not isinstance(values.get("model_cfg"), dict):
        raise UserError(f"{path} has no model_cfg")
    config = config_from_open_clip(values["model_cfg"], str(path))
    preprocess = preprocess_from_open_clip(values.get("preprocess_cfg") or {})
    weights = _weights(folder, OPEN_CLIP_WEIGHTS)
    arrays = read_arrays(weights)
    naming = infer.find_naming(arrays, str(weights))
    kwargs = values["model_cfg"]["text_cfg"].get("tokenizer_kwargs") or {}
    tokenizer = tokenizer_from_folder(
        folder,
        tokenizer_family(config),
        clean=kwargs.get("clean"),
        strip_sep=kwargs.get("strip_sep_token"),
    )
    return _finish(folder.name, config, arrays, naming, preprocess, weights, tokenizer)


def tokenizer_family(config: CLIPConfig) -> str:
    """Whose tokenizer a model has: a name of `tokenizers.folder.FAMILIES`."""
    text = config.text
    if text.pool == "last":
        if config.init_logit_bias is None:
            return "clipa"
        return "siglip2" if text.vocab_size == GEMMA else "siglip"
    return "clip" if text.vocab_size == CLIP_VOCABULARY else "metaclip2"


def _from_hf_folder(folder: Path) -> Checkpoint:
    values = read_json(folder / HF_CONFIG)
    config = config_from_hf(values, str(folder / HF_CONFIG))
    is_siglip = values["model_type"] == "siglip"
    preprocess = SIGLIP if is_siglip else OPENAI
    if (folder / "preprocessor_config.json").is_file():
        preprocess = preprocess_from_hf(read_json(folder / "preprocessor_config.json"))
    weights = _weights(folder, HF_WEIGHTS)
    naming = "hf_siglip" if is_siglip else "hf_clip"
    tokenizer = tokenizer_from_folder(folder, tokenizer_family(config))
    arrays = read_arrays(weights)
    return _finish(folder.name, config, arrays, naming, preprocess, weights, tokenizer)
