"""A config that a file of JSON holds, as an experiment: `--config FILE.json` is read by it.

ml_collections takes experiments from Python files alone, and what follows a colon as an argument:
`config_flags.parse` hands the JSON file to this one.
"""

import json
from collections.abc import Mapping
from typing import Any

import ml_collections

from clip_jax.config import default
from clip_jax.errors import UserError


def get_config(path: str) -> ml_collections.ConfigDict:
    """Return the defaults with the fields that the file gives, under "config" or by themselves.

    Raises:
      UserError: the file holds no config.
    """
    with open(path, encoding="utf-8") as file:
        values = json.load(file)
    given = values.get("config", values)
    if given is None:
        raise UserError(
            f"--config {path} holds no settings, as its search found none that fit: search again "
            "with more --devices or a smaller config.train.batch_size"
        )
    config = default()
    _update(config, given)
    return config


def _update(config: ml_collections.ConfigDict, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _update(config[key], value)
        else:
            config[key] = tuple(value) if isinstance(value, list) else value
