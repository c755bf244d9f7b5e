"""From an experiment file to a checked config: `default` and `resolve`, where a ConfigDict ends.

An experiment file returns `default()` with its differences. `main` turns that into the frozen
sections of `clip_jax.sections`.

What a field can be is said where it is implemented, and read from there. Those modules import JAX,
so they are imported when values are checked: a key that does not exist is refused before.
"""

import dataclasses
import difflib
import math
import types
import typing
from typing import Any

import ml_collections

from clip_jax.errors import UserError, check_choice
from clip_jax.sections import (
    Config,
    DataSection,
    EvalSection,
    MeshSection,
    ModelSection,
    OptimSection,
    TrainSection,
)


def default() -> ml_collections.ConfigDict:
    """Return every field at its default, locked: an unknown key is an error."""
    config = ml_collections.ConfigDict(dataclasses.asdict(Config()))
    # One string or a tuple of them, which a typed field could not change between.
    config.data.train = ml_collections.FieldReference(config.data.train, field_type=object)
    return config.lock()


def known_keys() -> list[str]:
    """Return the dotted name of every field."""
    sections = dataclasses.asdict(Config())
    nested = [f"{s}.{k}" for s, v in sections.items() if isinstance(v, dict) for k in v]
    return [s for s, v in sections.items() if not isinstance(v, dict)] + nested


def unknown_key_message(key: str) -> str:
    """Return one line on a key that does not exist, with the nearest that does."""
    near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.5)
    hint = f"did you mean config.{near[0]}?" if near else "see clip_jax/sections.py for all keys"
    return f"config.{key} does not exist; {hint}"


def _make_section(cls: type, values: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise UserError(unknown_key_message(prefix + key))
    fields = {}
    for key, kind in hints.items():
        if key not in values:
            raise UserError(
                f"config.{prefix}{key} is missing; start from clip_jax.config.default()"
            )
        fields[key] = _convert(kind, values[key], prefix + key)
    return cls(**fields)


def _convert(kind: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"config.{key} is {value!r}; it is a section with fields of its own")
        return _make_section(typing.cast(type, kind), value, key + ".")
    if isinstance(kind, types.UnionType):
        kinds = typing.get_args(kind)
        kind = next((k for k in kinds if k is type(value)), kinds[1])
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, str) or not hasattr(value, "__len__"):
            raise UserError(f"config.{key} is {value!r}; it takes a tuple of {item.__name__}")
        if ... not in typing.get_args(kind) and len(value) != len(typing.get_args(kind)):
            wanted = len(typing.get_args(kind))
            raise UserError(f"config.{key} has {len(value)} items; it takes {wanted}")
        return tuple(_convert(item, v, f"{key}[{i}]") for i, v in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"config.{key} is {value!r}; it takes a value of type {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"config.{key} is {value}; it takes a finite number")
    return value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def resolve(config: ml_collections.ConfigDict) -> Config:
    """Return the frozen config, its fields and their combination checked.

    Raises:
      UserError: a key is unknown or missing, a value has another type, or fields contradict.
    """
    c: Config = _make_section(Config, config.to_dict(), "")
    _check_model(c.model)
    _check_train(c.train)
    _check_optim(c.optim)
    _check_data(c.data, c.train.batch_size)
    _require(
        c.data.repeat or (c.train.epochs == 1 and not c.data.weights),
        "config.data.repeat is off, which is one pass: set config.train.epochs to 1,"
        " config.train.steps to 0 and give no config.data.weights",
    )
    _check_mesh(c.mesh)
    _check_eval(c.eval)
    _require(c.checkpoint.every > 0 and c.checkpoint.keep > 0, "config.checkpoint: both above 0")
    return c


def _above_zero(prefix: str, section: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(section, key)
        _require(value > 0, f"config.{prefix}.{key} is {value:g}; it must be above 0")


def _not_negative(prefix: str, section: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(section, key)
        _require(value >= 0, f"config.{prefix}.{key} is {value:g}; it must not be negative")


def _below_one(key: str, value: float) -> None:
    _require(0 <= value < 1, f"config.{key} is {value:g}; it takes 0 <= value < 1")


def _check_model(m: ModelSection) -> None:
    from clip_jax.models.execution import ATTENTION, DTYPES, REMAT

    check_choice("config.model.dtype", m.dtype, DTYPES)
    check_choice("config.model.attention", m.attention, ATTENTION)
    check_choice("config.model.remat", m.remat, REMAT)
    _not_negative("model", m, "image_size", "context_length")
    _below_one("model.patch_dropout", m.patch_dropout)
    _require(bool(m.init_from) or not m.init_tag, "config.model.init_tag needs init_from")


def _check_train(t: TrainSection) -> None:
    from clip_jax.losses import LOSSES
    from clip_jax.training.programs import COMPILE_AHEAD
    from clip_jax.training.state import FROZEN

    _require(
        (t.steps > 0) != (t.epochs > 0),
        f"config.train.steps is {t.steps} and config.train.epochs is {t.epochs:g}; "
        "give exactly one of them, above 0",
    )
    _above_zero("train", t, "batch_size", "log_every")
    _not_negative("train", t, "microbatch_size", "loss_tile")
    _require(
        t.microbatch_size == 0 or t.batch_size % t.microbatch_size == 0,
        f"config.train.batch_size {t.batch_size} is not a multiple of "
        f"config.train.microbatch_size {t.microbatch_size}; change one of them",
    )
    check_choice("config.train.loss", t.loss, LOSSES)
    check_choice("config.train.compile_ahead", t.compile_ahead, COMPILE_AHEAD)
    check_choice("config.train.freeze", t.freeze, FROZEN)
    _below_one("train.ema_decay", t.ema_decay)


def _check_optim(o: OptimSection) -> None:
    from clip_jax.training.optimizer import ELEMENTWISE, SCALERS, SPLIT

    check_choice("config.optim.name", o.name, SCALERS)
    check_choice("config.optim.split", o.split, SPLIT)
    _require(
        o.split != "on" or o.name in ELEMENTWISE,
        f'config.optim.split is "on" and config.optim.name {o.name}, which updates whole matrices; '
        f'leave it "auto", or take one of {", ".join(ELEMENTWISE)}',
    )
    _require(
        o.max_logit_scale >= 1, f"config.optim.max_logit_scale is {o.max_logit_scale:g}; at least 1"
    )


def _check_data(d: DataSection, batch_size: int) -> None:
    from clip_jax.data import caption_packing

    _above_zero("data", d, "streams", "threads", "window", "max_pixels")
    _require(
        batch_size % d.streams == 0,
        f"config.train.batch_size {batch_size} is not a multiple of config.data.streams "
        f"{d.streams}: every stream gives an equal share of a batch; change one of them",
    )
    _require(
        -1 <= d.processes <= d.threads,
        f"config.data.processes is {d.processes}; it takes -1 to {d.threads}, the number of"
        " config.data.threads",
    )
    if d.caption_packing not in caption_packing.CHOICES:
        caption_packing.parse_shares(d.caption_packing)
    sources = 1 if isinstance(d.train, str) else len(d.train)
    _require(
        len(d.weights) in (0, sources) and all(w > 0 for w in d.weights),
        f"config.data.weights is {d.weights} for {sources} sources in config.data.train; give one"
        " above 0 for each, or none",
    )
    for key in ("flip", "grayscale", "max_skip_fraction"):
        share = getattr(d, key)
        _require(0 <= share <= 1, f"config.data.{key} is {share:g}; it takes 0 to 1")
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


def _check_mesh(m: MeshSection) -> None:
    _above_zero("mesh", m, "fsdp", "tensor")
    _require(m.data > 0 or m.data == -1, f"config.mesh.data is {m.data}; above 0, or -1 for all")


def _check_eval(e: EvalSection) -> None:
    from clip_jax.evaluation.run import may_name_classes
    from clip_jax.evaluation.tasks import TASKS, TRAINED_TASKS, ZERO_SHOT

    _above_zero("eval", e, "batch_size")
    _not_negative("eval", e, "every")
    in_training = bool(e.every and e.data)
    _require(
        in_training or not e.best, "config.eval.best needs config.eval.every and config.eval.data"
    )
    for task in e.tasks:
        check_choice("config.eval.tasks", task, TASKS)
    trained = [task for task in e.tasks if task in TRAINED_TASKS]
    _require(
        not trained or bool(e.train_data),
        f"config.eval.tasks has {trained[:1]} but config.eval.train_data names no shards",
    )
    _require(
        bool(e.classnames) or ZERO_SHOT not in e.tasks or may_name_classes(e.data),
        f"config.eval.data is {e.data!r} but config.eval.classnames names no file, "
        "and it has no class names of its own; name one, or leave zeroshot_classification out of "
        "config.eval.tasks",
    )
    # A template without {} may be the name of a shipped list: one word.
    _require(
        all("{}" in t or (t and not set(t) & set(" {")) for t in (*e.templates, *e.ablate)),
        f"config.eval.templates is {e.templates}; every template needs a {{}}",
    )
