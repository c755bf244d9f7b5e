"""Read a published checkpoint, in whatever format: arrays, config, preprocessing and tokenizer.

What belongs to weights travels with them: activation, preprocessing, tokenizer. Nothing of a file
is executed, and no part of a model is returned where another is wrong.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.data.images import NAFLEX, OPENAI, SIGLIP, Preprocess
from clip_jax.errors import UserError, located, note, note_unknown, short
from clip_jax.files import check_fetched
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.naflex import NaFlexConfig
from clip_jax.models.sizes import check_layers
from clip_jax.models.zoo import GEMMA, MODELS, model_config
from clip_jax.pretrained import infer
from clip_jax.pretrained.hf_config import config_from_hf
from clip_jax.pretrained.layouts import import_arrays
from clip_jax.pretrained.npz_file import read_npz
from clip_jax.pretrained.open_clip_config import config_from_open_clip
from clip_jax.pretrained.preprocess import (
    patches_from_hf,
    preprocess_from_hf,
    preprocess_from_open_clip,
)
from clip_jax.pretrained.reparameterize import is_branched, reparameterize
from clip_jax.pretrained.safetensors_file import read_safetensors
from clip_jax.pretrained.tags import family_preprocess, find_pretrained
from clip_jax.pretrained.torch_file import read_torch, read_torch_shards
from clip_jax.pretrained.trees import array_shapes
from clip_jax.tokenizers.folder import tokenizer_from_folder
from clip_jax.tokenizers.spec import TokenizerSpec

Arrays = Mapping[str, np.ndarray]

OPEN_CLIP_CONFIG, HF_CONFIG = "open_clip_config.json", "config.json"
# In a folder, the first of these that is there holds the weights.
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
HF_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
CAPTIONER = "text_decoder."  # what the names of CoCa's third part begin with
# Long-CLIP's two tables of positions, and how many rows of the first are read.
SHORT_POSITIONS, LONG_POSITIONS, LONG_KEEPS = "positional_embedding", "positional_embedding_res", 20
LONG_CONTEXT = 248
CLIP_VOCABULARY = 49_408
TORCH_ENDINGS = (".pt", ".pth", ".bin", ".ckpt")
# What a training run or a compiler puts before every name.
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")
# Endings of weights of other libraries.
_OTHER_WEIGHTS = {".h5", ".msgpack", ".onnx", ".gguf", ".tflite", ".ot"}
# What is read of processor_config.json, and what changes no image.
_PROCESSOR_KNOWN = {"image_processor", "processor_class", "tokenizer", "auto_map"}
_PROCESSOR_KNOWN |= {"transformers_version"}
# Buffers that OpenAI's archives keep, and no other file does.
_OPENAI_BUFFERS = {"input_resolution", "context_length", "vocab_size"}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model as it was published.

    Attributes:
      name: the registered model, or the file's.
      config: its sizes, activation and all.
      arrays: for each path of the parameter tree, a function that reads its array, float32.
      preprocess: the preprocessing of its images.
      tokenizer: the one it was trained with; None where its files are not there.
    """

    name: str
    config: CLIPConfig
    arrays: dict[str, Callable[[], np.ndarray]]
    preprocess: Preprocess
    tokenizer: TokenizerSpec | None


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
        inner = _sentence_transformers_model(path)
        if inner is not None:
            return _from_hf_folder(inner)
        raise UserError(
            f"{path} holds no checkpoint: neither {OPEN_CLIP_CONFIG} nor {HF_CONFIG} is there"
        )
    if not path.exists():
        raise UserError(
            f"{path} does not exist; give a checkpoint's file or folder, or a name such as "
            '"ViT-B-32:laion2b_s34b_b79k" or "hf-hub:owner/name"'
        )
    beside = path.parent / OPEN_CLIP_CONFIG
    if model is None and path.name in OPEN_CLIP_WEIGHTS and beside.is_file():
        return _from_open_clip_folder(path.parent)
    if model is None and path.name in HF_WEIGHTS and (path.parent / HF_CONFIG).is_file():
        return _from_hf_folder(path.parent)
    return _from_file(path, model)


def read_arrays(path: Path) -> Arrays:
    """Return the arrays of one file by its names for them, wrappers' prefixes removed.

    Raises:
      UserError: the file is of no known format, cannot be read, or is damaged.
    """
    check_fetched(path)
    ending = path.suffix.lower()
    if ending == ".npz":
        return unstack(read_npz(path))
    if ending == ".safetensors" or path.name.endswith(".safetensors.index.json"):
        arrays = read_safetensors(path)
    elif path.name.endswith(".bin.index.json"):
        arrays = read_torch_shards(path)
    elif ending in TORCH_ENDINGS:
        arrays = read_torch(path)
    else:
        raise UserError(f"{path}: give a .pt, .bin, .safetensors or .npz file, or a folder")
    plain = {_WRAPPERS.sub("", name): array for name, array in arrays.items()}
    if len(plain) < len(arrays):
        raise UserError(f"{path}: it has some arrays twice, with and without `module.` before them")
    return _inner_model(plain, path)


def _inner_model(arrays: Arrays, path: Path) -> Arrays:
    """Return the arrays of the model that a module around it holds, as Lightning's `model.`.

    Raises:
      UserError: it holds several, or changes to a model (LoRA).
    """
    if any(".lora_" in name for name in arrays):
        raise UserError(
            f"{path} holds LoRA's changes to a model: add them to its weights, with PEFT "
            "model.merge_and_unload().save_pretrained(FOLDER), and give that folder"
        )
    if "logit_scale" in arrays:
        return arrays
    prefixes = [
        name.removesuffix("logit_scale") for name in arrays if name.endswith(".logit_scale")
    ]
    if "model." in prefixes:
        prefixes = ["model."]
    if len(prefixes) > 1:
        raise UserError(
            f"{path} holds several models, {', '.join(prefixes)}: save one alone, "
            "torch.save(model.state_dict(), path)"
        )
    for prefix in prefixes:
        inner = {
            _WRAPPERS.sub("", name.removeprefix(prefix)): array
            for name, array in arrays.items()
            if name.startswith(prefix)
        }
        if len(inner) < len(arrays):
            left_out = len(arrays) - len(inner)
            note(f"{path}: {left_out} arrays beside those of the model in {prefix} are left out")
        return inner
    return arrays


def _read_foldable(path: Path) -> Arrays:
    """Return the arrays of one file, those of branches that are one convolution folded."""
    arrays = read_arrays(path)
    towers = {key: array for key, array in arrays.items() if not key.startswith(CAPTIONER)}
    if len(towers) < len(arrays):
        left_out = len(arrays) - len(towers)
        message = (
            f"{path}: the {left_out} arrays of its captioner, which is not built, are left out"
        )
        print(message, file=sys.stderr, flush=True)
    if LONG_POSITIONS in towers:
        return _merge_long_positions(towers)
    if not is_branched(towers):
        return towers
    try:
        return reparameterize(towers)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"{path}: the branches of its image tower cannot be folded: one is missing or has a "
            f"shape that the others do not fit ({short(error)})"
        ) from None


def _merge_long_positions(arrays: Arrays) -> Arrays:
    """Return the arrays of a Long-CLIP with one table of positions.

    It trains those behind the first twenty in a table of their own (Zhang et al. 2024,
    arXiv:2403.15378, section 3.1), and reads each table at its own rows alone.
    """
    if SHORT_POSITIONS not in arrays:
        raise UserError(f"{LONG_POSITIONS} is there without {SHORT_POSITIONS}: no Long-CLIP is so")
    first, rest = arrays[SHORT_POSITIONS], arrays[LONG_POSITIONS]
    if first.shape != rest.shape or first.ndim != 2:
        raise UserError(
            f"{LONG_POSITIONS} has the shape {list(rest.shape)} and {SHORT_POSITIONS} "
            f"{list(first.shape)}: no Long-CLIP has"
        )
    merged = np.concatenate([first[:LONG_KEEPS], rest[LONG_KEEPS:]])
    return {k: v for k, v in arrays.items() if k != LONG_POSITIONS} | {SHORT_POSITIONS: merged}


def unstack(arrays: Arrays) -> Arrays:
    """Return layers that big_vision scanned over, `encoderblock/...` [layers, ...], one by one."""
    unstacked: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        before, stacked, after = name.partition("/encoderblock/")
        if stacked:
            layers = enumerate(array)
            unstacked |= {f"{before}/encoderblock_{i}/{after}": layer for i, layer in layers}
        else:
            unstacked[name] = array
    # Checkpoints of a whole training state keep the optimizer's beside the parameters.
    return {name: array for name, array in unstacked.items() if not name.startswith("opt/")}


def _from_file(path: Path, model: str | None) -> Checkpoint:
    arrays = _read_foldable(path)
    naming = infer.find_naming(arrays, str(path))
    if naming.startswith("hf_"):
        raise UserError(f"{path}: weights of Hugging Face need their {HF_CONFIG}; give the folder")
    if naming == "big_vision":
        config = infer.big_vision_config(arrays, str(path))
        return _make_checkpoint(path.stem, config, arrays, naming, SIGLIP, path)
    if "+" in naming:
        name, preprocess = _parse_model(model or infer.model_of_arrays(arrays, naming, str(path)))
        return _make_checkpoint(name, model_config(name), arrays, naming, preprocess, path)
    sizes = infer.read_signature(arrays, naming, str(path))
    name, preprocess = model or path.stem, OPENAI
    if arrays.keys() & _OPENAI_BUFFERS or sizes.context_length == LONG_CONTEXT:
        # Long-CLIPs are OpenAI's models, trained on.
        config = infer.openai_config(sizes)
    elif model is None:
        config = infer.zoo_config(sizes, str(path))
        preprocess = family_preprocess(next(iter(infer.matching_models(sizes))))
    else:
        name, preprocess = _parse_model(model)
        if name == model and f"{name}-gelu" in MODELS:
            raise UserError(
                f"{path}: {name} is {name}-quickgelu to OpenAI and {name}-gelu to open_clip, and "
                "the weights do not say which they are; give one of the two as model="
            )
        config = model_config(name)
    return _make_checkpoint(name, config, arrays, naming, preprocess, path, sizes=sizes)


def _parse_model(model: str) -> tuple[str, Preprocess]:
    """Return the zoo's name and the preprocessing that "name" or "name:tag" stands for."""
    name, colon, tag = model.partition(":")
    if not colon:
        return name, family_preprocess(name)
    pretrained = find_pretrained(name, tag)
    if pretrained is None:
        raise UserError(
            f"model {model!r}: open_clip has no such pretrained pair that can be loaded here; "
            "see clip_jax.list_pretrained()"
        )
    return pretrained


def _make_checkpoint(
    name: str,
    config: CLIPConfig,
    arrays: Arrays,
    naming: str,
    preprocess: Preprocess,
    path: Path,
    tokenizer: TokenizerSpec | None = None,
    *,
    sizes: infer.Signature | None = None,
) -> Checkpoint:
    """Return the checkpoint of a file's arrays, which must be those of the config.

    Args:
      sizes: those that the file's own arrays have, where the config came from a name.

    Raises:
      UserError: arrays are missing or unexpected, or a shape differs.
    """
    if tokenizer is None and tokenizer_family(config) == "clip":
        tokenizer = TokenizerSpec()
    if config.init_logit_bias is None and "logit_bias" in arrays:
        # open_clip's --siglip trains any model with a bias, which its config need not say.
        config = dataclasses.replace(config, init_logit_bias=-10.0)
    check_layers(config, len(arrays), str(path))
    try:
        readers = import_arrays(
            arrays, array_shapes(config), naming, f"{path} does not hold a {name}"
        )
    except UserError as error:
        if sizes is None or infer.config_signature(config) == sizes:
            raise
        raise UserError(f"{error}; its sizes are nearest to {infer.nearest_model(sizes)}") from None
    return Checkpoint(name, config, readers, preprocess, tokenizer)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file.

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


def _find_weights(folder: Path, names: tuple[str, ...]) -> Path:
    """Return the first of these files that is there."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    others = sorted(p.name for p in folder.glob("*") if p.suffix in _OTHER_WEIGHTS)
    unread = f"; {', '.join(others)} cannot be read" if others else ""
    raise UserError(
        f"{folder} has a config but no weights: none of {', '.join(names)} is there{unread}"
    )


def _sentence_transformers_model(folder: Path) -> Path | None:
    """Return the CLIP's folder in one that sentence-transformers saved; None if there is none."""
    for path in sorted(folder.glob("*_CLIPModel")):
        if (folder / "modules.json").is_file() and (path / HF_CONFIG).is_file():
            return path
    return None


def _check_size(preprocess_size: Any, config: CLIPConfig, where: str) -> None:
    """Say if a file's size of images is another than the model's, which is taken."""
    sizes = preprocess_size.values() if isinstance(preprocess_size, Mapping) else preprocess_size
    sizes = [sizes] if isinstance(sizes, int) else list(sizes or [])
    size = config.vision.image_size
    if any(isinstance(side, int) and side != size for side in sizes):
        note(f"{where}: images of {preprocess_size} pixels; the model's {size} are taken")


def _from_open_clip_folder(folder: Path) -> Checkpoint:
    path = folder / OPEN_CLIP_CONFIG
    values = read_json(path)
    if not isinstance(values.get("model_cfg"), dict):
        raise UserError(f"{path} has no model_cfg")
    note_unknown(values, {"model_cfg", "preprocess_cfg"}, str(path))
    with located(str(path)):
        config = config_from_open_clip(values["model_cfg"], str(path))
    preprocess = preprocess_from_open_clip(values.get("preprocess_cfg") or {})
    _check_size((values.get("preprocess_cfg") or {}).get("size"), config, str(path))
    weights = _find_weights(folder, OPEN_CLIP_WEIGHTS)
    arrays = _read_foldable(weights)
    naming = infer.find_naming(arrays, str(weights))
    kwargs = values["model_cfg"]["text_cfg"].get("tokenizer_kwargs") or {}
    tokenizer = tokenizer_from_folder(
        folder,
        tokenizer_family(config),
        clean=kwargs.get("clean"),
        strip_sep=kwargs.get("strip_sep_token"),
    )
    return _make_checkpoint(folder.name, config, arrays, naming, preprocess, weights, tokenizer)


def tokenizer_family(config: CLIPConfig) -> str:
    """Return the family of a model's tokenizer: a name of `tokenizers.folder.FAMILIES`."""
    text = config.text
    if text.encoder is not None:
        return "encoder" if text.encoder.norms == "after" else "nllb"
    if text.pool == "last":
        if config.init_logit_bias is None:
            return "clipa"
        return "siglip2" if text.vocab_size == GEMMA else "siglip"
    return "clip" if text.vocab_size == CLIP_VOCABULARY else "metaclip2"


def _from_hf_folder(folder: Path) -> Checkpoint:
    values = read_json(folder / HF_CONFIG)
    with located(str(folder / HF_CONFIG)):
        config = config_from_hf(values, str(folder / HF_CONFIG))
    kind = values["model_type"]
    preprocess = {"siglip": SIGLIP, "siglip2": NAFLEX}.get(kind, OPENAI)
    # The first is what transformers writes since version 5.
    for name in ("processor_config.json", "preprocessor_config.json"):
        settings = read_json(folder / name) if (folder / name).is_file() else {}
        if name == "processor_config.json":
            note_unknown(settings, _PROCESSOR_KNOWN, str(folder / name))
            settings = settings.get("image_processor") or {}
        if settings:
            preprocess = preprocess_from_hf(settings, where=name)
            if kind != "siglip2":  # whose images keep their shape
                _check_size(settings.get("size"), config, str(folder / name))
            config = _with_patches(config, preprocess, settings, name)
            break
    else:
        note(
            f"{folder} has neither processor_config.json nor preprocessor_config.json: its images "
            f"are prepared as those of {'OpenAI' if preprocess is OPENAI else 'SigLIP'}"
        )
    weights = _find_weights(folder, HF_WEIGHTS)
    naming = f"hf_{kind}" if kind.startswith("siglip") else "hf_clip"
    tokenizer = tokenizer_from_folder(folder, tokenizer_family(config))
    arrays = read_arrays(weights)
    return _make_checkpoint(folder.name, config, arrays, naming, preprocess, weights, tokenizer)


def _with_patches(
    config: CLIPConfig, preprocess: Preprocess, settings: Mapping[str, Any], where: str
) -> CLIPConfig:
    """Return the config with the number of patches that a processor's settings ask for.

    Raises:
      UserError: the processor makes patches and the tower takes none, or the other way round; or
        their sides differ.
    """
    vision = config.vision
    is_naflex = isinstance(vision, NaFlexConfig)
    if is_naflex != (preprocess.resize_mode == "patches"):
        raise UserError(f"{where}: its processor is not that of the model in {HF_CONFIG}")
    if not isinstance(vision, NaFlexConfig):
        return config
    size, count = patches_from_hf(settings, where)
    if size != vision.patch_size:
        raise UserError(
            f"{where}: patch_size is {size} and that of the model in {HF_CONFIG} "
            f"{vision.patch_size}"
        )
    vision = dataclasses.replace(vision, max_patches=count)
    return dataclasses.replace(config, vision=vision)
