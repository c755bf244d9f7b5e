"""The fingerprint of a run: what must be the same when it is resumed.

It lies in every checkpoint. Checkpoints of earlier versions lack keys that are in it now: what
the run had there stands in its work folder's `config.json`.
"""

import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError
from clip_jax.models.clip import CLIPConfig
from clip_jax.parallel.distributed import from_first, is_first
from clip_jax.pretrained.work_folder import (
    CONFIG_FILENAME,
    WEIGHTS_FILENAME,
    model_to_json,
    read_description,
)
from clip_jax.sections import Config, all_values, fixed_values
from clip_jax.tokenizers import TokenizerSpec, spec_digest

Fingerprint = dict[str, Any]

TOKENIZER = "the tokenizer's fingerprint"
PAIRS, DATA = "the number of training pairs", "the training data's fingerprint"
TEACHERS = "the teachers' weights"
CONTENTS, SOURCE = "the contents of the training shards", "the contents of the first weights"
FIELD_OF = {
    TOKENIZER: "config.data.tokenizer",
    PAIRS: "config.data.train",
    DATA: "config.data.train",
    CONTENTS: "config.data.train",
    SOURCE: "config.model.init_from",
    TEACHERS: "config.distill.teachers",
}
"""The field of the config by which a change of what is not in the config is allowed."""
RUN_FILES = ("metrics.jsonl", "best", WEIGHTS_FILENAME)
"""What a work folder holds besides its config.json, and a run would write anew."""


def run_fingerprint(
    config: Config,
    model: CLIPConfig,
    tokenizer: TokenizerSpec,
    *,
    data: str,
    pairs: int,
    contents: str | None,
    source: str | None,
    teachers: Sequence[str] = (),
) -> Fingerprint:
    """Return the fingerprint of a run, as it is after a round trip through JSON.

    Args:
      config: all of its fields that `sections.may_change` does not mark are part of it.
      model: the sizes of the model.
      tokenizer: its content is part of it, wherever its file lies.
      data: the fingerprint of the training data.
      pairs: the number of training pairs.
      contents: the digest of what the shards hold; None where it is not known.
      source: the digest of the weights that the run starts from; None without any, and where they
        are not there any more.
      teachers: their identities.
    """
    values = fixed_values(config) | {
        "the model's sizes": model_to_json(model),
        TOKENIZER: spec_digest(tokenizer),
        PAIRS: pairs,
        DATA: data,
        TEACHERS: teachers,
    }
    known = {CONTENTS: contents, SOURCE: source}
    values |= {key: value for key, value in known.items() if value is not None}
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


def check_fingerprint(
    saved: Fingerprint,
    current: Fingerprint,
    workdir: str | Path,
    allow_change: Collection[str] = (),
) -> dict[str, tuple[Any, Any]]:
    """Refuse to resume a run on other data, with another model or with another config.

    What a checkpoint of an earlier version does not have is not compared, nor are contents that
    are not known any more.

    Args:
      allow_change: the fields ("config.optim.learning_rate") that may differ all the same.

    Returns:
      Those that do: the value before and the value now, by name.

    Raises:
      UserError: another field differs; the line names it with both values.
    """
    changes = {}
    for key in current | saved:
        if key not in saved or saved[key] == current.get(key):
            continue
        if key in (CONTENTS, SOURCE) and key not in current:
            continue
        field = FIELD_OF.get(key, key)
        if field not in allow_change:
            allow = f", or allow it with --allow-change {field}" if "." in field else ""
            raise UserError(
                f"the run in {workdir} was made with {key} = {_short(saved[key])} and now it is "
                f"{_short(current.get(key))}; continue with the old value, choose another "
                f"--workdir{allow}"
            )
        changes[key] = (saved[key], current.get(key))
    return changes


def check_new_folder(
    current: Fingerprint, workdir: str | Path, allow_change: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Refuse to begin a run where its files would take the place of others.

    A run that ended before its first checkpoint begins again in its own folder, if it is the same
    run. All processes have to call it. Arguments and result are those of `check_fingerprint`.

    Raises:
      UserError: the folder holds a model, or the beginning of another run.
    """
    folder = Path(workdir)
    found = _begun(folder) if is_first() else None
    message, saved = from_first(found)
    if message:
        raise UserError(f"--workdir {workdir} {message}; give another, or move it away")
    return check_fingerprint(saved, current, workdir, allow_change)


def _begun(folder: Path) -> tuple[str, Fingerprint]:
    """Return why no run may begin in a folder ("" if one may), and what is known of its own."""
    path = folder / CONFIG_FILENAME
    if not path.exists():
        other = next((name for name in RUN_FILES if (folder / name).exists()), None)
        return f"holds {other} and no {CONFIG_FILENAME} of a run" if other else "", {}
    config = _saved_config(folder)
    if not config:
        return f"holds a {CONFIG_FILENAME} that is not of a run", {}
    defaults = json.loads(json.dumps(fixed_values(Config())))
    saved = {key: _lookup(config, key, default) for key, default in defaults.items()}
    with suppress(UserError, OSError):  # an earlier version's, or one without its tokenizer
        tokenizer = read_description(folder).tokenizer
        saved |= {} if tokenizer is None else {TOKENIZER: spec_digest(tokenizer)}
    return "", saved


def changed_settings(workdir: str | Path, config: Config) -> dict[str, tuple[Any, Any]]:
    """Return the fields of the config that differ from the work folder's: before and now, by name.

    Call it on one process, before `config.json` is written anew.
    """
    saved = _saved_config(Path(workdir))
    if not saved:
        return {}
    now = json.loads(json.dumps(all_values(config)))
    before = {key: _lookup(saved, key, value) for key, value in now.items()}
    return {key: (before[key], now[key]) for key in now if before[key] != now[key]}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
