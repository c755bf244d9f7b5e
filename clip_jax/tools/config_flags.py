"""`--config FILE --config.a.b=value`: the experiment of a command."""

import os
from collections.abc import Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from clip_jax.config import known_keys, unknown_key_message
from clip_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "An experiment (.py, or .json); --config.a.b=value overrides a field."
)


def parse(argv: Sequence[str]) -> ml_collections.ConfigDict:
    """Parse the flags; return the experiment's config with its overrides.

    Raises:
      UserError: a flag, a config key or the experiment file is wrong.
    """
    known = known_keys()
    for arg in argv[1:]:
        key = arg.lstrip("-").removeprefix("config.").split("=")[0]
        if arg.lstrip("-").startswith("config.") and key not in known:
            raise UserError(unknown_key_message(key))
    try:
        rest = flags.FLAGS(_with_json(argv))[1:]
        config = _CONFIG.value
        if config is not None:
            config.to_dict()  # a file that could not be read says so only when it is used
    except Exception as error:
        raise UserError(_reason(error, argv)) from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; fields are set as --config.a.b=value")
    if config is None:
        raise UserError("--config is missing; for example --config experiments/emoji.py")
    return config


def _with_json(argv: Sequence[str]) -> list[str]:
    """Return the arguments, a config in JSON replaced by the experiment that reads it."""
    reader = Path(__file__).with_name("json_config.py")
    given = list(argv)
    for i, argument in enumerate(given):
        flag, equals, path = argument.partition("=")
        if flag.lstrip("-") != "config":
            continue
        position = i if equals else i + 1
        path = path if equals else "".join(given[position : position + 1])
        if path.endswith(".json") and os.path.isfile(path):
            given[position] = f"{flag}{equals}" * bool(equals) + f"{reader}:{path}"
    return given


def _reason(error: Exception, argv: Sequence[str]) -> str:
    """Return one line on why the flags could not be parsed."""
    text = str(error).strip()
    in_file = "Traceback" in text or not isinstance(error, flags.Error)
    if not in_file:
        return " ".join(text.split())
    # What the experiment file raises comes through ml_collections, at times as a whole traceback.
    flat = " ".join(argv[1:]).replace("--config=", "--config ")
    path = flat.partition("--config ")[2].split(" ")[0].partition(":")[0]
    if not os.path.isfile(path):
        return f"--config {path}: no such file (folder: {os.getcwd()})"
    last = text.splitlines()[-1] if text else ""
    kind = "" if "Traceback" in text else f"{type(error).__name__}: "
    return f"experiment file {path}: {kind}{last}"
