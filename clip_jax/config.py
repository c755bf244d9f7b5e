"""From an experiment file to a checked config: `default` and `resolve`, where a ConfigDict ends.

An experiment file returns `default()` with its differences. `main` turns that into the frozen
sections of `clip_jax.sections`.

What a field can be is said where it is implemented, and read from there. Those modules import JAX,
so they are imported when values are checked: a key that does not exist is refused before.
"""

import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from typing import Any

import ml_collections

from clip_jax.errors import UserError, check_choice
from clip_jax.sections import (
    Bounds,
    Config,
    DataSection,
    DistillSection,
    EvalSection,
    MeshSection,
    ModelSection,
    OptimSection,
    TrainSection,
)

MAX_ITEMS, MAX_TEXT = 1_000, 100_000


def default() -> ml_collections.ConfigDict:
    """Return every field at its default, locked: an unknown key is an error.

    >>> config = default()
    >>> config.model.name, config.train.batch_size
    ('ViT-B/32', 256)
    """
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
    for field in dataclasses.fields(cls):
        _check_bounds(field, fields[field.name], prefix + field.name)
    return cls(**fields)


def _check_bounds(field: dataclasses.Field[Any], value: Any, key: str) -> None:
    bounds: Bounds | None = field.metadata.get("bounds")
    items = value if isinstance(value, tuple) else (value,)
    if bounds is not None:
        for item in items:
            if not bounds.hold(item):
                raise UserError(f"config.{key} is {_shown(item)}; it takes {bounds}")
    texts = [item for item in items if isinstance(item, str)]
    if len(texts) > MAX_ITEMS or any(len(text) > MAX_TEXT for text in texts):
        raise UserError(
            f"config.{key} is longer than {MAX_ITEMS:,} items of {MAX_TEXT:,} characters"
        )


def _shown(value: Any) -> str:
    """Return a value for a message, in one line and not too long."""
    try:
        text = repr(value)
    except Exception:  # Python refuses to print an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def _convert(kind: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(
                f"config.{key} is {_shown(value)}; it is a section with fields of its own"
            )
        return _make_section(typing.cast(type, kind), value, key + ".")
    if isinstance(kind, types.UnionType):
        kinds = typing.get_args(kind)
        kind = next((k for k in kinds if k is type(value)), kinds[1])
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, str) or not hasattr(value, "__len__"):
            raise UserError(f"config.{key} is {_shown(value)}; it takes a tuple of {item.__name__}")
        if ... not in typing.get_args(kind) and len(value) != len(typing.get_args(kind)):
            wanted = len(typing.get_args(kind))
            raise UserError(f"config.{key} has {len(value)} items; it takes {wanted}")
        return tuple(_convert(item, v, f"{key}[{i}]") for i, v in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > sys.float_info.max:
            raise UserError(f"config.{key} is too large a number")
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(
            f"config.{key} is {_shown(value)}; it takes a value of type {kind.__name__}"
        )
    if kind is float and not math.isfinite(value):
        raise UserError(f"config.{key} is {value}; it takes a finite number")
    return value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def resolve(config: ml_collections.ConfigDict) -> Config:
    """Return the frozen config, its fields and their combination checked.

    >>> config = default()
    >>> config.train.steps = 2000
    >>> resolve(config).optim.name
    'adamw'

    Raises:
      UserError: a key is unknown or missing, a value has another type, or fields contradict.
    """
    c: Config = _make_section(Config, config.to_dict(), "")
    _check_model(c.model)
    _check_train(c.train)
    _check_optim(c.optim)
    _check_data(c.data, c.train.batch_size)
    unpacked = {
        "config.model.text_drop_path": c.model.text_drop_path,
        "config.data.negatives": c.data.negatives,
    }
    for name, value in unpacked.items():
        _require(
            not value or c.data.caption_packing in ("auto", "off"),
            f"{name} is set, for which captions are not packed: leave"
            ' config.data.caption_packing "auto" or "off"',
        )
    _require(
        c.data.repeat or (c.train.epochs == 1 and not c.data.weights),
        "config.data.repeat is off, which is one pass: set config.train.epochs to 1,"
        " config.train.steps to 0 and give no config.data.weights",
    )
    _check_distill(c.distill)
    _check_mesh(c.mesh)
    _check_eval(c.eval)
    return c


def _check_model(m: ModelSection) -> None:
    from clip_jax.models.execution import ATTENTION, DTYPES, REMAT

    check_choice("config.model.dtype", m.dtype, DTYPES)
    check_choice("config.model.attention", m.attention, ATTENTION)
    check_choice("config.model.remat", m.remat, REMAT)
    _require(bool(m.init_from) or not m.init_tag, "config.model.init_tag needs init_from")


def _check_train(t: TrainSection) -> None:
    from clip_jax.losses import LOSSES
    from clip_jax.training.metrics_sender import SERVICES
    from clip_jax.training.programs import COMPILE_AHEAD
    from clip_jax.training.rates import FROZEN, parse_rates

    _require(
        (t.steps > 0) != (t.epochs > 0),
        f"config.train.steps is {t.steps} and config.train.epochs is {t.epochs:g}; "
        "give exactly one of them, above 0",
    )
    _require(
        t.microbatch_size == 0 or t.batch_size % t.microbatch_size == 0,
        f"config.train.batch_size {t.batch_size} is not a multiple of "
        f"config.train.microbatch_size {t.microbatch_size}; change one of them",
    )
    check_choice("config.train.loss", t.loss, LOSSES)
    check_choice("config.train.compile_ahead", t.compile_ahead, COMPILE_AHEAD)
    check_choice("config.train.freeze", t.freeze, FROZEN)
    check_choice("config.train.report_to", t.report_to, ("", *SERVICES))
    _require(
        not t.report_to or bool(re.fullmatch(r"[\w.-]{1,128}", t.report_project, re.ASCII)),
        f"config.train.report_project is {_shown(t.report_project)}; it takes letters, digits, "
        '"_", "-" and "."',
    )
    parse_rates(t.rates)
    _check_patterns("config.train.lora_targets", t.lora_targets)


def _check_patterns(key: str, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"{key} has {_shown(pattern)}, which is no regular expression: {error}"
            ) from None


def _check_optim(o: OptimSection) -> None:
    from clip_jax.training.optimizer import ELEMENTWISE, EXTENDABLE, SCALERS, SCHEDULES, SPLIT

    check_choice("config.optim.name", o.name, SCALERS)
    check_choice("config.optim.split", o.split, SPLIT)
    check_choice("config.optim.schedule", o.schedule, SCHEDULES)
    _require(
        not o.cooldown_steps or o.schedule in EXTENDABLE,
        f"config.optim.cooldown_steps is {o.cooldown_steps} and config.optim.schedule "
        f"{o.schedule!r}, which ends at 0 by itself; take one of {', '.join(EXTENDABLE)}, or 0",
    )
    _require(
        o.split != "on" or o.name in ELEMENTWISE,
        f'config.optim.split is "on" and config.optim.name {o.name}, which updates whole matrices; '
        f'leave it "auto", or take one of {", ".join(ELEMENTWISE)}',
    )


def _check_data(d: DataSection, batch_size: int) -> None:
    from clip_jax.data import caption_packing
    from clip_jax.data.captions import parse_captions
    from clip_jax.training.device_augment import ERASING_MODES

    _require(
        batch_size % d.streams == 0,
        f"config.train.batch_size {batch_size} is not a multiple of config.data.streams "
        f"{d.streams}: every stream gives an equal share of a batch; change one of them",
    )
    _require(d.threads != 0, "config.data.threads is 0; above 0, or -1 for every core")
    # How many -1 are is the host's to say: the loader checks it there.
    _require(
        d.threads == -1 or d.processes <= d.threads,
        f"config.data.processes is {d.processes}; it takes -1 to {d.threads}, the number of"
        " config.data.threads",
    )
    parse_captions(d.captions)
    parse_captions([f"{d.negatives}=1"] if d.negatives else [], "negatives")
    check_choice("config.data.erasing_mode", d.erasing_mode, ERASING_MODES)
    if d.caption_packing not in caption_packing.CHOICES:
        caption_packing.parse_shares(d.caption_packing)
    sources = 1 if isinstance(d.train, str) else len(d.train)
    _require(
        len(d.weights) in (0, sources) and all(w > 0 for w in d.weights),
        f"config.data.weights is {d.weights} for {sources} sources in config.data.train; give one"
        " above 0 for each, or none",
    )
    _require(
        0 < d.crop_scale[0] <= d.crop_scale[1] <= 1,
        f"config.data.crop_scale is {d.crop_scale}; it takes 0 < low <= high <= 1",
    )
    _require(
        0 < d.crop_ratio[0] <= d.crop_ratio[1],
        f"config.data.crop_ratio is {d.crop_ratio}; it takes 0 < low <= high",
    )


def _check_distill(d: DistillSection) -> None:
    from clip_jax.models.execution import DTYPES

    check_choice("config.distill.dtype", d.dtype, DTYPES)
    _require(
        not (d.teachers or d.features) or d.affinity_weight + d.feature_weight > 0,
        "config.distill has a teacher, and its affinity_weight and feature_weight are 0: raise one",
    )


def _check_mesh(m: MeshSection) -> None:
    _require(m.data > 0 or m.data == -1, f"config.mesh.data is {m.data}; above 0, or -1 for all")


def _check_eval(e: EvalSection) -> None:
    from clip_jax.evaluation.run import may_name_classes
    from clip_jax.evaluation.tasks import TASKS, TRAINED_TASKS, ZERO_SHOT

    in_training = bool(e.every and e.data)
    _require(
        in_training or not e.best, "config.eval.best needs config.eval.every and config.eval.data"
    )
    _require(in_training or not e.keep, "config.eval.keep needs config.eval.every and .data")
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
