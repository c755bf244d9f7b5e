"""Adapters in PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.

PEFT names a matrix by the module that it stands beside, `base_model.model.MODULE.lora_A.weight`,
and keeps it transposed, [rank, in] and [out, rank]. Modules are named as transformers has them, or
open_clip, whose attention holds query, key and value in one module with one adapter.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from clip_jax.errors import UserError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.lora import LORA_A, LORA_B, TARGETS
from clip_jax.pretrained.hf_config import config_to_hf
from clip_jax.pretrained.load import Checkpoint
from clip_jax.pretrained.names import Place, find_place
from clip_jax.pretrained.open_clip_naming import config_naming
from clip_jax.pretrained.safetensors_file import read_safetensors
from clip_jax.pretrained.trees import array_shapes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MHA_OUT = 2
"""How often PEFT 0.21's `MultiheadAttention.merge`, which its forward pass calls too, adds the
adapter of the projection behind attention: once itself, once by that layer's own `merge`."""
REFUSED = {"use_dora": False, "bias": "none", "modules_to_save": None, "fan_in_fan_out": False}
"""Fields of PEFT's config that change what an adapter means, and the one value that is read."""


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters of single blocks, by the paths of their kernels.

    Attributes:
      pairs: (lora_a [in, rank], lora_b [rank, out]), float32.
      scales: what each product is multiplied by.
    """

    pairs: dict[str, tuple[np.ndarray, np.ndarray]]
    scales: dict[str, float]


def write_peft(
    folder: Path, leaves: Mapping[str, np.ndarray], config: CLIPConfig, *, alpha: float, base: str
) -> int:
    """Write adapters as transformers' model takes them, into a folder that exists.

    `peft.PeftModel.from_pretrained(CLIPModel, FOLDER)` loads them.

    Args:
      folder: where.
      leaves: the adapters of single blocks, by path: "visual/.../kernel/lora_a".
      config: the model's.
      alpha: of all adapters.
      base: the name of the model that they belong to.

    Returns:
      How many numbers they are.

    Raises:
      UserError: transformers has no such model.
    """
    naming = "hf_siglip" if config_to_hf(config)["model_type"] == "siglip" else "hf_clip"
    tensors, modules, rank = {}, [], 0
    for path, x in leaves.items():
        kernel, _, kind = path.rpartition("/")
        place = find_place(kernel, naming)
        if place.parts > 1 or not place.key.endswith(".weight") or "conv" in kernel:
            raise UserError(
                f"{kernel} is no linear layer of transformers' model, whose adapters PEFT's files "
                "hold here; convert to own, with the adapters merged"
            )
        module = place.key.removesuffix(".weight")
        modules.append(module)
        rank = x.shape[-1] if kind == LORA_A else rank
        letter = {LORA_A: "A", LORA_B: "B"}[kind]
        tensors[f"{PREFIX}{module}.lora_{letter}.weight"] = np.ascontiguousarray(x.T, np.float32)
    values = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(set(modules)),
        "inference_mode": True,
        **REFUSED,
    }
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return sum(x.size for x in tensors.values())


def read_peft(folder: str | Path, config: CLIPConfig) -> Adapters:
    """Read adapters that PEFT wrote for transformers' or open_clip's model, or that we did.

    Raises:
      UserError: they cannot be read, belong to another model, or are of a kind that is not read.
    """
    folder = Path(folder)
    values = _read_config(folder / CONFIG)
    if values.get("peft_type") != "LORA":
        raise UserError(f"{folder / CONFIG} has adapters of {values.get('peft_type')}, not LORA")
    for field, value in REFUSED.items():
        if values.get(field, value) not in (value, []):
            raise UserError(f"{folder / CONFIG} has {field} {values[field]!r}, which is not read")
    tensors = {key.removeprefix(PREFIX): x for key, x in read_safetensors(folder / WEIGHTS).items()}
    found, used = dict[str, tuple[np.ndarray, np.ndarray]](), set[str]()
    scales: dict[str, float] = {}
    for path, shape in array_shapes(config).items():
        if not any(re.search(p, path) for word, p in TARGETS.items() if word != "conv"):
            continue
        for place in _places(path, config):
            module = _module_of(place, tensors)
            if module is None:
                continue
            keys = [f"{module}.lora_{letter}.weight" for letter in "AB"]
            first, second = (tensors[key].astype(np.float32) for key in keys)
            size = second.shape[0] // place.parts
            second = second[place.part * size : (place.part + 1) * size]
            if first.shape[1] * second.shape[0] != math.prod(shape):
                raise UserError(
                    f"{folder}: {keys[0]} is {first.shape} and {keys[1]} {tensors[keys[1]].shape}, "
                    f"and the model's {path} is {shape}"
                )
            scale = _scale(module, first.shape[0], values)
            if ".attn.base_layer." in f"{module}.":
                scale *= MHA_OUT
            found[path], scales[path] = (first.T, second.T), scale
            used |= set(keys)
            break
    left = sorted(tensors.keys() - used)
    if left or not found:
        raise UserError(
            f"{folder} has adapters of another model: {left[0] if left else 'none'} has no place "
            f"({len(left)} of {len(tensors)})"
        )
    return Adapters(found, scales)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} is no JSON of PEFT's")
    return values


def _places(path: str, config: CLIPConfig) -> list[Place]:
    """Return the places of a kernel in each library that has this model."""
    places = []
    for naming in ("hf_clip", "hf_siglip", config_naming(config)):
        try:
            places.append(find_place(path, naming))
        except UserError:
            continue
    return places


def _module_of(place: Place, tensors: Mapping[str, np.ndarray]) -> str | None:
    """Return the module of a file's adapters that stands beside a place, if there is one."""
    module = re.sub(r"(\.|_)weight$", "", place.key)
    names = [module]
    if module.endswith(".in_proj"):
        names = [module.removesuffix(".in_proj")]
    elif module.endswith(".attn.out_proj"):
        # PEFT wraps open_clip's attention, and within it the linear layer behind it.
        names.append(module.replace(".attn.out_proj", ".attn.base_layer.out_proj"))
    return next((name for name in names if f"{name}.lora_A.weight" in tensors), None)


def _scale(module: str, rank: int, values: Mapping[str, Any]) -> float:
    """Return what PEFT multiplies a module's product by."""

    def of_module(field: str, default: float) -> float:
        patterns = values.get(field) or {}
        matches = (p for p in patterns if re.match(rf"(.*\.)?({p})$", module))
        return next((float(patterns[p]) for p in matches), default)

    alpha = of_module("alpha_pattern", float(values.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def with_peft(checkpoint: Checkpoint, folder: str | Path) -> Checkpoint:
    """Return a checkpoint whose kernels have the adapters of a folder merged in.

    Raises:
      UserError: as `read_peft`; or the checkpoint is a run.
    """
    if not checkpoint.arrays:
        raise UserError("adapters are merged into weights of a file: convert the run first")
    adapters = read_peft(folder, checkpoint.config)
    arrays = dict(checkpoint.arrays)
    for path, (first, second) in adapters.pairs.items():
        scale = adapters.scales[path]
        arrays[path] = functools.partial(_merge, arrays[path], first, second, scale)
    return dataclasses.replace(checkpoint, arrays=arrays)


def _merge(
    read: Callable[[], np.ndarray], first: np.ndarray, second: np.ndarray, scale: float
) -> np.ndarray:
    kernel = read()
    product = first.astype(np.float64) @ second.astype(np.float64)
    return (kernel + (scale * product).reshape(kernel.shape)).astype(np.float32)
