"""The configuration: every field with its default, and `resolve`, where a ConfigDict ends.

An experiment file returns `default()` with its differences. `main` turns that into the frozen
`Config` below; every other room takes plain arguments.
"""

import dataclasses
import difflib
import typing
from typing import Any

import ml_collections

from clip_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """What is trained."""

    name: str = "ViT-B/32"
    """A row of `clip_jax.list_models()`."""
    dtype: str = "float32"
    """Of activations and matrix products, float32 or bfloat16; parameters stay float32."""


@dataclasses.dataclass(frozen=True)
class TrainSection:
    """How long, on how much at once, and by which loss."""

    steps: int = 0
    """Optimiser steps of the whole run; or give `epochs`."""
    epochs: float = 0.0
    """Passes over the training data; steps = epochs * pairs / batch_size, rounded down."""
    batch_size: int = 256
    """Pairs in a global batch."""
    loss: str = "softmax"
    """"softmax" (InfoNCE, the CLIP paper) or "sigmoid" (SigLIP)."""
    loss_tile: int = 1024
    """Most columns of the logits in memory at a time."""
    mask_equal_captions: bool = False
    """Leave pairs with the same caption out of the negatives."""
    log_every: int = 10
    """Steps between two lines of metrics."""


@dataclasses.dataclass(frozen=True)
class OptimSection:
    """AdamW with decoupled decay, warm-up and cosine (paper, section 2.5 and table 18)."""

    learning_rate: float = 5e-4
    """At the end of the warm-up."""
    warmup_steps: int = 2000
    """Steps of linear warm-up from 0; a shorter run warms up over a tenth of its steps at most."""
    weight_decay: float = 0.2
    """On matrices and embeddings; gains, biases and the temperature have none."""
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    clip_norm: float = 0.0
    """Largest global norm of a gradient; 0 leaves it alone."""
    max_logit_scale: float = 100.0
    """The scale exp(logit_scale) is held at or below this after every update."""


@dataclasses.dataclass(frozen=True)
class DataSection:
    """Where pairs come from and what is done to them."""

    train: str = ""
    """Tar shards: a path, a brace pattern, a glob, a folder, or several joined by "::"."""
    tokenizer: str = "clip"
    """"clip", or the path of a sentencepiece .model file."""
    streams: int = 8
    """Parallel streams of samples; a multiple of every number of hosts the run may use."""
    window: int = 8
    """Shards of a stream that are shuffled together."""
    threads: int = 4
    """Threads that decode."""
    cache_bytes: int = 0
    """Memory for decoded pictures kept between epochs; 0 keeps none."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Share of the picture's area that a training crop keeps."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a training crop."""
    color_jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Most by which a training picture's brightness, contrast and saturation change, in 0..1."""


@dataclasses.dataclass(frozen=True)
class MeshSection:
    """Devices along each axis; their product is the number of devices."""

    data: int = -1
    """Copies of the model; -1 takes the devices the other axes leave."""
    fsdp: int = 1
    """Devices that split the batch and the parameters between them."""
    tensor: int = 1
    """Devices that split each matrix product between them."""


@dataclasses.dataclass(frozen=True)
class EvalSection:
    """Zero-shot classification and retrieval at the end of a run; empty `data` means none."""

    data: str = ""
    """Tar shards with .cls members, named like `data.train`."""
    classnames: str = ""
    """File of class names: one a line, or a JSON list."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Prompts whose embeddings are averaged; {} is the class name."""
    batch_size: int = 256


@dataclasses.dataclass(frozen=True)
class CheckpointSection:
    """When to save and what to keep."""

    every: int = 1000
    """Steps between saves; the last step is always saved."""
    keep: int = 3
    """Newest checkpoints that stay."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment."""

    seed: int = 0
    model: ModelSection = ModelSection()
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    data: DataSection = DataSection()
    mesh: MeshSection = MeshSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()


def default() -> ml_collections.ConfigDict:
    """Every field at its default, locked: an unknown key is an error."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config())).lock()


def known_keys() -> list[str]:
    """Every field's dotted name."""
    sections = dataclasses.asdict(Config())
    nested = [f"{s}.{k}" for s, v in sections.items() if isinstance(v, dict) for k in v]
    return [s for s, v in sections.items() if not isinstance(v, dict)] + nested


def unknown_key_message(key: str) -> str:
    """One line for a key that does not exist, with the nearest that does."""
    near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.5)
    hint = f"did you mean config.{near[0]}?" if near else "see clip_jax/config.py for all keys"
    return f"config.{key} does not exist; {hint}"


def _section(cls: type, values: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise UserError(unknown_key_message(prefix + key))
    made = {}
    for key, kind in hints.items():
        if key not in values:
            raise UserError(
                f"config.{prefix}{key} is missing; start from clip_jax.config.default()"
            )
        made[key] = _field(kind, values[key], prefix + key)
    return cls(**made)


def _field(kind: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"config.{key} is {value!r}; it is a section with fields of its own")
        return _section(typing.cast(type, kind), value, key + ".")
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, str) or not hasattr(value, "__len__"):
            raise UserError(f"config.{key} is {value!r}; it takes a tuple of {item.__name__}")
        if ... not in typing.get_args(kind) and len(value) != len(typing.get_args(kind)):
            wanted = len(typing.get_args(kind))
            raise UserError(f"config.{key} has {len(value)} items; it takes {wanted}")
        return tuple(_field(item, v, f"{key}[{i}]") for i, v in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"config.{key} is {value!r}; it takes a value of type {kind.__name__}")
    return value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def resolve(config: ml_collections.ConfigDict) -> Config:
    """The frozen config, its fields and their combination checked.

    Raises:
      UserError: a key is unknown or missing, a value has another type, or fields contradict.
    """
    c: Config = _section(Config, config.to_dict(), "")
    t, o, d, m = c.train, c.optim, c.data, c.mesh
    _require(
        (t.steps > 0) != (t.epochs > 0),
        f"config.train.steps is {t.steps} and config.train.epochs is {t.epochs:g}; "
        "give exactly one of them, above 0",
    )
    _require(t.batch_size > 0, f"config.train.batch_size is {t.batch_size}; it must be above 0")
    _require(t.loss_tile > 0, f"config.train.loss_tile is {t.loss_tile}; it must be above 0")
    _require(t.log_every > 0, f"config.train.log_every is {t.log_every}; it must be above 0")
    _require(
        t.loss in ("softmax", "sigmoid"),
        f'config.train.loss is {t.loss!r}; it is "softmax" or "sigmoid"',
    )
    _require(
        c.model.dtype in ("float32", "bfloat16"),
        f'config.model.dtype is {c.model.dtype!r}; it is "float32" or "bfloat16"',
    )
    _require(
        o.max_logit_scale >= 1, f"config.optim.max_logit_scale is {o.max_logit_scale:g}; at least 1"
    )
    _require(d.streams > 0, f"config.data.streams is {d.streams}; it must be above 0")
    _require(
        t.batch_size % d.streams == 0,
        f"config.train.batch_size {t.batch_size} is not a multiple of config.data.streams "
        f"{d.streams}: every stream gives an equal share of a batch; change one of them",
    )
    _require(
        0 < d.crop_scale[0] <= d.crop_scale[1] <= 1,
        f"config.data.crop_scale is {d.crop_scale}; it takes 0 < low <= high <= 1",
    )
    _require(
        0 < d.crop_ratio[0] <= d.crop_ratio[1],
        f"config.data.crop_ratio is {d.crop_ratio}; it takes 0 < low <= high",
    )
    _require(
        all(0 <= amount <= 1 for amount in d.color_jitter),
        f"config.data.color_jitter is {d.color_jitter}; each takes 0 to 1",
    )
    _require(d.threads > 0, f"config.data.threads is {d.threads}; it must be above 0")
    _require(d.window > 0, f"config.data.window is {d.window}; it must be above 0")
    for name in ("fsdp", "tensor"):
        size = getattr(m, name)
        _require(size > 0, f"config.mesh.{name} is {size}; it must be above 0")
    _require(m.data > 0 or m.data == -1, f"config.mesh.data is {m.data}; above 0, or -1 for all")
    _require(
        not c.eval.data or bool(c.eval.classnames),
        f"config.eval.data is {c.eval.data!r} but config.eval.classnames names no file",
    )
    _require(
        all("{}" in template for template in c.eval.templates),
        f"config.eval.templates is {c.eval.templates}; every template needs a {{}}",
    )
    _require(c.checkpoint.every > 0 and c.checkpoint.keep > 0, "config.checkpoint: both above 0")
    return c
