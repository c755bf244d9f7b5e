"""The types and the bounds of a model's sizes, which may come from a stranger's file."""

import dataclasses
import functools
import math
import types
import typing
from typing import Any

from clip_jax.errors import UserError

MAX_SIZE, MAX_LAYERS, MAX_ITEMS = 2**22, 2**10, 64
AT_LEAST_ONE = {
    *("image_size", "patch_size", "width", "heads", "context_length", "vocab_size", "embed_dim"),
    *("reference_grid", "pool_heads", "pool_queries"),
}


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def check_sizes(config: Any, where: str) -> None:
    """Check every field of a model's dataclass before anything is built with it.

    Args:
      config: the dataclass.
      where: its name in messages: "vision", "text".

    Raises:
      UserError: a value has another type, or is beyond what any model has.
    """
    cls: Any = type(config)
    for name, kind in _hints(cls).items():
        _check(getattr(config, name), kind, f"{where}.{name}", name)
    width, heads = getattr(config, "width", None), getattr(config, "heads", None)
    if isinstance(width, int) and isinstance(heads, int) and width % heads:
        raise UserError(f"{where}.width is {width}, not a multiple of {where}.heads, {heads}")
    if getattr(config, "mlp_width", 1) < 1:
        raise UserError(f"{where} has an MLP without features: mend its mlp_ratio or mlp_width")
    if getattr(config, "norm_eps", 1.0) < 0:
        raise UserError(f"{where}.norm_eps is {config.norm_eps}; it takes a number from 0 on")


def _check(value: Any, kind: Any, where: str, name: str) -> None:
    if isinstance(kind, types.UnionType):
        kinds = typing.get_args(kind)
        if value is None and type(None) in kinds:
            return
        if any(dataclasses.is_dataclass(one) for one in kinds):
            if not isinstance(value, kinds):
                raise UserError(f"{where} is {value!r:.60}; it is a table of sizes")
            return
        kind = next(one for one in kinds if one is not type(None))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, typing.cast(type, kind)):
            raise UserError(f"{where} is {value!r:.60}; it is a table of sizes")
    elif typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        is_wrong = ... not in items and isinstance(value, tuple) and len(value) != len(items)
        if not isinstance(value, tuple) or len(value) > MAX_ITEMS or is_wrong:
            raise UserError(f"{where} is {value!r:.60}; it takes a list of at most {MAX_ITEMS}")
        for item in value:
            _check(item, typing.get_args(kind)[0], where, name)
    elif kind is int:
        low = int(name in AT_LEAST_ONE)
        high = MAX_LAYERS if name in ("layers", "depths") else MAX_SIZE
        if type(value) is not int or not low <= value <= high:
            raise UserError(f"{where} is {value!r:.60}; it takes a whole number, {low} to {high:,}")
    elif kind is float:
        if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > MAX_SIZE:
            raise UserError(f"{where} is {value!r:.60}; it takes a number")
    elif kind in (bool, str) and type(value) is not kind:
        raise UserError(f"{where} is {value!r:.60}; it takes a value of type {kind.__name__}")


def check_layers(config: Any, arrays: int, where: str) -> None:
    """Raise UserError if a model has more blocks than a file has arrays: it cannot hold them."""
    layers = 0
    for tower in (config.vision, config.text):
        depths: Any = getattr(tower, "layers", getattr(tower, "depths", 0))
        layers += sum(depths) if isinstance(depths, tuple) else depths
    if layers > arrays:
        raise UserError(f"{where} holds {arrays} arrays and its config has {layers} blocks")
