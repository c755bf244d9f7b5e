"""The fingerprint of a run: what must be the same when it is resumed.

It lies in every checkpoint. Checkpoints of earlier versions lack keys that are in it now: what
the run had there stands in its work folder's `config.json`.
"""

import json
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError
from clip_jax.models.clip import CLIPConfig
from clip_jax.parallel.distributed import from_first, is_first
from clip_jax.pretrained.work_folder import CONFIG_FILENAME, model_to_json
from clip_jax.sections import Config, fixed_values
from clip_jax.tokenizers import TokenizerSpec, spec_digest

Fingerprint = dict[str, Any]


def run_fingerprint(
    config: Config, model: CLIPConfig, tokenizer: TokenizerSpec, *, data: str, pairs: int
) -> Fingerprint:
    """Return the fingerprint of a run, as it is after a round trip through JSON.

    Args:
      config: all of its fields that `sections.may_change` does not mark are part of it.
      model: the sizes of the model.
      tokenizer: its content is part of it, wherever its file lies.
      data: the fingerprint of the training data.
      pairs: the number of training pairs.
    """
    values = fixed_values(config) | {
        "the model's sizes": model_to_json(model),
        "the tokenizer's fingerprint": spec_digest(tokenizer),
        "the number of training pairs": pairs,
        "the training data's fingerprint": data,
    }
    return json.loads(json.dumps(values))


def complete_fingerprint(saved: Fingerprint, workdir: str | Path) -> Fingerprint:
    """Return a checkpoint's fingerprint with the fields of the config that it lacks.

    They are taken from the `config.json` of the work folder as the run left it, and a field that
    it lacks as well has its default: earlier versions had no such field. Without a readable
    `config.json` nothing is known of them. All processes have to call it.
    """
    defaults = json.loads(json.dumps(fixed_values(Config())))
    if not defaults.keys() - saved.keys():
        return saved
    config = from_first(_saved_config(Path(workdir)) if is_first() else None)
    if config is None:
        return saved
    return {key: _lookup(config, key, default) for key, default in defaults.items()} | saved


def saved_value(workdir: str | Path, key: str, default: Any) -> Any:
    """Return a field ("config.data.streams") of the config that a run left in its work folder.

    All processes have to call it.
    """
    config = from_first(_saved_config(Path(workdir)) if is_first() else None)
    return default if config is None else _lookup(config, key, default)


def _saved_config(workdir: Path) -> dict[str, Any] | None:
    try:
        return json.loads((workdir / CONFIG_FILENAME).read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lookup(config: dict[str, Any], key: str, default: Any) -> Any:
    """Return the value of "config.train.loss" in nested dicts."""
    value: Any = config
    for name in key.split(".")[1:]:
        if not isinstance(value, dict) or name not in value:
            return default
        value = value[name]
    return value


def check_fingerprint(saved: Fingerprint, current: Fingerprint, workdir: str | Path) -> None:
    """Refuse to resume a run on other data, with another model or with another config.

    What a checkpoint of an earlier version does not have is not compared.

    Raises:
      UserError: a field differs; the line names it with both values.
    """
    for key in current | saved:
        if key in saved and saved[key] != current.get(key):
            raise UserError(
                f"the run in {workdir} was made with {key} = {_short(saved[key])} and now it is "
                f"{_short(current.get(key))}; continue with the old value or choose another "
                "--workdir"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
