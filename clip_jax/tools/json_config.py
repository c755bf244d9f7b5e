"""A config that a file of JSON holds, as an experiment: `--config FILE.json` is read by it.

ml_collections takes experiments from Python files alone, and what follows a colon as an argument:
`config_flags.parse` hands the JSON file to this one.
"""

import json
from collections.abc import Mapping
from typing import Any

import ml_collections

from clip_jax.config import default, unknown_key_message
from clip_jax.errors import UserError


def get_config(path: str) -> ml_collections.ConfigDict:
    """Return the defaults with the fields that the file gives, under "config" or by themselves.

    Raises:
      UserError: the file holds no config.
    """
    values = _read(path)
    given = values.get("config", values)
    if given is None:
        raise UserError(
            f"--config {path} holds no settings, as its search found none that fit: search again "
            "with more --devices or a smaller config.train.batch_size"
        )
    if not isinstance(given, dict):
        raise UserError(f'--config {path}: its "config" is no object; give {{"config": {{...}}}}')
    config = default()
    _update(config, given, path)
    return config


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except (ValueError, RecursionError) as error:  # broken JSON, or no UTF-8
        raise UserError(f"--config {path} is no JSON ({error}): mend it") from None
    if not isinstance(values, dict):
        raise UserError(f'--config {path} is no object of fields; give {{"model": {{...}}}} say')
    return values


def _update(
    config: ml_collections.ConfigDict, values: Mapping[str, Any], path: str, prefix: str = ""
) -> None:
    for key, value in values.items():
        if key not in config:
            raise UserError(f"--config {path}: {unknown_key_message(prefix + key)}")
        if isinstance(config[key], ml_collections.ConfigDict):
            if not isinstance(value, dict):
                raise UserError(f"--config {path}: config.{prefix}{key} is no object of fields")
            _update(config[key], value, path, f"{prefix}{key}.")
            continue
        try:
            config[key] = tuple(value) if isinstance(value, list) else value
        except TypeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--config {path}: config.{prefix}{key}: {reason}") from None
