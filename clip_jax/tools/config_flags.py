"""`--config FILE --config.a.b=value`: the experiment of a command."""

import difflib
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from clip_jax import experiments
from clip_jax.config import default, known_keys, unknown_key_message
from clip_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "An experiment: its name, such as vit_b32, or a file (.py, or .json); "
    "--config.a.b=value overrides a field.",
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
        rest = flags.FLAGS(_with_files(argv))[1:]
        config = _CONFIG.value
        if config is not None:
            config.to_dict()  # a file that could not be read says so only when it is used
    except Exception as error:
        raise UserError(_reason(error, argv)) from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; fields are set as --config.a.b=value")
    if config is None:
        raise UserError("--config is missing; for example --config emoji")
    return config


def help_text(doc: str, own: Sequence[flags.FlagHolder]) -> str:
    """Return what `--help` prints: the docstring, the flags and every field with its default.

    Args:
      doc: the command's docstring.
      own: the command's flags, beside `--config`.
    """
    lines = [doc.rstrip(), "", "flags:"]
    for name in [_CONFIG.name, *(holder.name for holder in own)]:
        flag = flags.FLAGS[name]
        shown = "" if flag.default in (None, False, []) else f" (default: {flag.default})"
        lines += textwrap.wrap(
            f"{flag.help}{shown}", 96, initial_indent=f"  --{name}  ", subsequent_indent=" " * 6
        )
    values = default()
    lines += ["", "fields of the config, with their defaults:"]
    for key in known_keys():
        section, _, field = key.rpartition(".")
        value = values[section][field] if section else values[key]
        lines.append(f"  --config.{key}={value!r}")
    return "\n".join(lines)


def _with_files(argv: Sequence[str]) -> list[str]:
    """Return the arguments, the experiment of --config replaced by the file that is to be run.

    An experiment's name becomes its file; a config in JSON, the experiment that reads it.
    """
    reader = Path(__file__).with_name("json_config.py")
    given = list(argv)
    for i, argument in enumerate(given):
        flag, equals, path = argument.partition("=")
        if flag.lstrip("-") != "config":
            continue
        position = i if equals else i + 1
        path = path if equals else "".join(given[position : position + 1])
        is_file = os.path.isfile(path)
        file = path if is_file else str(experiments.find(path) or path)
        if is_file and path.endswith(".json"):
            file = f"{reader}:{path}"
        if file != path:
            given[position] = f"{flag}{equals}" * bool(equals) + file
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
    if not os.path.isfile(path) and experiments.find(path) is None:
        near = difflib.get_close_matches(Path(path).stem, experiments.names(), n=1)
        hint = f"; did you mean --config {near[0]}?" if near else ""
        return f"--config {path}: no such file or experiment (folder: {os.getcwd()}){hint}"
    if isinstance(error, UserError):
        return text if path in text else f"experiment file {path}: {text}"
    last = text.splitlines()[-1] if text else ""
    kind = "" if "Traceback" in text else f"{type(error).__name__}: "
    return f"experiment file {path}: {kind}{last}"
