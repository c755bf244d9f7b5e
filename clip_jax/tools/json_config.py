"""A config that a file of JSON holds, as an experiment: `--config FILE.json` is read by it.

ml_collections takes experiments from Python files alone, and what follows a colon as an argument:
`config_flags.parse` hands the JSON file to this one.
"""

import json
from collections.abc import Mapping
from typing import Any

import ml_collections

from clip_jax.config import default


def get_config(path: str) -> ml_collections.ConfigDict:
    """Return the defaults with the fields that the file gives, under "config" or by themselves."""
    with open(path, encoding="utf-8") as file:
        values = json.load(file)
    config = default()
    _update(config, values.get("config", values))
    return config


def _update(config: ml_collections.ConfigDict, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _update(config[key], value)
        else:
            config[key] = tuple(value) if isinstance(value, list) else value
