"""Describe the model of a work folder in its `config.json`, enough to load it without its code.

The weights beside it are the checkpoints of a run, or one `model.safetensors` that was converted.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from clip_jax.data.images import OPENAI, Preprocess
from clip_jax.errors import UserError, located, short
from clip_jax.files import atomic_write
from clip_jax.models.block_form import BlockForm
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.image_towers import IMAGE_TOWERS, VISION_KINDS
from clip_jax.models.rotary import RotaryConfig
from clip_jax.models.sizes import check_layers
from clip_jax.models.text import EncoderForm, TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.pretrained.layouts import import_arrays
from clip_jax.pretrained.preprocess import preprocess_from_json, preprocess_to_json
from clip_jax.pretrained.safetensors_file import read_safetensors
from clip_jax.pretrained.trees import array_shapes
from clip_jax.tokenizers.spec import TokenizerSpec, spec_from_json, spec_to_json

CONFIG_FILENAME = "config.json"
WEIGHTS_FILENAME = "model.safetensors"
CHECKPOINT_DIRNAME = "checkpoints"

# Fields that earlier versions did not have, with their defaults, which are not written: a run of
# theirs is resumed, and its model is the same.
LATER_FIELDS: dict[str, dict[str, Any]] = {
    "vision": {
        "proj_bias": False,
        "pool_heads": None,
        "pool_mlp_ratio": None,
        "form": None,
        "patch_stages": (),
        "has_positions": True,
        "class_position": True,
        "mbconv_widths": (),
        "pool_queries": 256,
    },
    "text": {"class_token": False, "encoder": None},
}


@dataclasses.dataclass(frozen=True)
class RunDescription:
    """A model as the `config.json` of a work folder describes it.

    Attributes:
      model_name: its entry of the zoo.
      model: its sizes, the tokenizer's included.
      tokenizer: its file, where it has one, lies in the work folder; None where none is known.
      preprocess: the preprocessing of its images.
      config: the resolved experiment, as nested dicts; empty for a converted model.
    """

    model_name: str
    model: CLIPConfig
    tokenizer: TokenizerSpec | None
    preprocess: Preprocess = OPENAI
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


def is_work_folder(path: str | Path) -> bool:
    """Return whether a folder's `config.json` is this project's, not Hugging Face's."""
    try:
        values = json.loads((Path(path) / CONFIG_FILENAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Absent: another format. Damaged: named by whoever reads it next.
        return (Path(path) / CHECKPOINT_DIRNAME).is_dir()
    return isinstance(values, dict) and "model_name" in values


def model_to_json(config: CLIPConfig) -> dict[str, Any]:
    """Return the sizes of a model as values that JSON has."""
    kind = IMAGE_TOWERS[type(config.vision)].kind
    values = dataclasses.asdict(config)
    values["vision"] = {"kind": kind, **values["vision"]}
    for tower, fields in LATER_FIELDS.items():
        values[tower] = {
            name: value
            for name, value in values[tower].items()
            if name not in fields or value != fields[name]
        }
    # One form, whether the dict is fresh or was read back: lists instead of tuples.
    return json.loads(json.dumps(values))


def model_from_json(values: Mapping[str, Any]) -> CLIPConfig:
    """Return the sizes that `model_to_json` wrote.

    Folders written before each tower had its own activation hold one of the whole model.
    """
    vision, text = dict(values["vision"]), dict(values["text"])
    rest = {k: v for k, v in values.items() if k not in ("vision", "text", "activation")}
    cls = VISION_KINDS[vision.pop("kind")]
    vision = {k: tuple(v) if isinstance(v, list) else v for k, v in vision.items()}
    if vision.get("form") is not None:
        vision["form"] = _form_from_json(vision["form"])
    if text.get("encoder") is not None:
        text["encoder"] = EncoderForm(**text["encoder"])
    if "activation" in values:
        text["activation"] = values["activation"]
        if cls is ViTConfig:
            vision["activation"] = values["activation"]
    return CLIPConfig(**rest, vision=cls(**vision), text=TextConfig(**text))


def _form_from_json(values: Mapping[str, Any]) -> BlockForm:
    """Return the form of a block that `model_to_json` wrote."""
    rotary = values["rotary"]
    return BlockForm(**{**values, "rotary": None if rotary is None else RotaryConfig(**rotary)})


def write_description(workdir: Path, description: RunDescription) -> RunDescription:
    """Write `config.json`, and a copy of a tokenizer's file; return what was written."""
    tokenizer = description.tokenizer
    if tokenizer is not None and tokenizer.file is not None:
        target = workdir / f"tokenizer{Path(tokenizer.file).suffix}"
        if Path(tokenizer.file).absolute() != target.absolute():
            with atomic_write(target) as partial:
                shutil.copyfile(tokenizer.file, partial)
        tokenizer = dataclasses.replace(tokenizer, file=target.name)
    description = dataclasses.replace(description, tokenizer=tokenizer)
    values = {
        "model_name": description.model_name,
        "model": model_to_json(description.model),
        "tokenizer": None if tokenizer is None else spec_to_json(tokenizer),
        "preprocess": preprocess_to_json(description.preprocess),
        "config": description.config,
    }
    with atomic_write(workdir / CONFIG_FILENAME) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n")
    return description


def read_description(workdir: str | Path) -> RunDescription:
    """Return the description in a work folder, its tokenizer's path made absolute.

    Raises:
      UserError: the folder or its `config.json` is missing or damaged.
    """
    path = Path(workdir) / CONFIG_FILENAME
    try:
        values = json.loads(path.read_text())
        tokenizer = None
        if values["tokenizer"] is not None:
            tokenizer = spec_from_json(values["tokenizer"], where=f"{path}: tokenizer")
            if tokenizer.file is not None:
                tokenizer = dataclasses.replace(tokenizer, file=str(Path(workdir) / tokenizer.file))
        with located(str(path)):
            model = model_from_json(values["model"])
        return RunDescription(
            model_name=values["model_name"],
            model=model,
            tokenizer=tokenizer,
            preprocess=preprocess_from_json(
                values.get("preprocess", {}), where=f"{path}: preprocess"
            ),
            config=values["config"],
        )
    except FileNotFoundError:
        raise UserError(
            f"{workdir} is not a work folder: it has no {CONFIG_FILENAME}; give that of a run"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} is damaged ({short(error)})") from None


def write_work_folder(
    folder: Path, description: RunDescription, arrays: Mapping[str, np.ndarray]
) -> None:
    """Write a work folder without a run: its description, and the weights in one file.

    Args:
      folder: where; it exists.
      description: the model, its tokenizer and its preprocessing.
      arrays: parameters and batch statistics by path, float32.
    """
    in_order = {path: np.asarray(array, order="C") for path, array in arrays.items()}
    save_file(in_order, folder / WEIGHTS_FILENAME)
    write_description(folder, description)


def read_weights(path: Path, config: CLIPConfig) -> dict[str, Callable[[], np.ndarray]]:
    """Return, for each path of the parameter tree, a function that reads its array.

    Args:
      path: a weights file of `write_work_folder`.
      config: the sizes of its model.

    Raises:
      UserError: the file is damaged or holds another model.
    """
    arrays = read_safetensors(path)
    check_layers(config, len(arrays), str(path))
    return import_arrays(arrays, array_shapes(config), "work_folder", str(path))
