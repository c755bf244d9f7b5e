"""Load class names and prompt templates: those of the paper, which are shipped, and those of files.

`prompt_data/` holds open_clip's names and templates of ImageNet and CLIP_benchmark's of the other
data sets of the CLIP paper; `prompt_data/NOTICE` says under which licenses. `label_names.json` are
the names that data sets give their own labels, with spaces for "_" and "/" (those of aircraft as
they are), and `imagenet_subsets.json` the classes of ImageNet that ImageNet-A, -R and -O have.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_jax.data.formats.remote import read_whole
from clip_jax.errors import UserError

MAX_BYTES = 1 << 28
"""Of a file of names or prompts, which may be remote."""
SHIPPED = Path(__file__).parent / "prompt_data"

# Named lists for configs and commands; other names are of shipped data sets, or a file's path.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "name": ("{}",),
    "photo": ("a photo of a {}.",),
}


@functools.cache
def _shipped(file: str) -> dict[str, list[Any]]:
    return json.loads((SHIPPED / file).read_text(encoding="utf-8"))


@functools.cache
def shipped_class_names() -> dict[str, list[str]]:
    """Return the class names in label order, by data set."""
    names = _shipped("label_names.json") | _shipped("en_classnames.json")
    imagenet = names["imagenet1k"]
    subsets = {
        dataset: [imagenet[m] for m in classes]
        for dataset, classes in _shipped("imagenet_subsets.json").items()
    }
    return names | subsets | dict.fromkeys(("imagenetv2", "imagenet_sketch"), imagenet)


def shipped_templates() -> dict[str, list[str]]:
    """Return the templates by data set, ImageNet's as "imagenet_1", "imagenet_7", "imagenet_80"."""
    imagenet = _shipped("imagenet_prompts.json")
    templates = dict(_shipped("en_zeroshot_classification_templates.json"))
    templates["imagenet_1"] = ["a photo of a {}."]
    templates["imagenet_7"] = imagenet["templates_7"]
    templates["imagenet_80"] = imagenet["templates"]
    return templates


def load_class_names(name_or_path: str | Path) -> list[str]:
    """Return class names in label order.

    Args:
      name_or_path: a shipped data set ("imagenet1k"), a JSON list, or a text file with one name a
        line.

    Raises:
      UserError: the file cannot be read, or a name is empty.
    """
    if str(name_or_path) in shipped_class_names():
        return list(shipped_class_names()[str(name_or_path)])
    return _read_strings(name_or_path, "class names")


def load_templates(name_or_path: str | Path | Sequence[str]) -> list[str]:
    """Return prompt templates with "{}" for the class name.

    Args:
      name_or_path: a name in `TEMPLATES` or of a shipped list ("imagenet_80", "food101"), a JSON
        list or text file, or the templates themselves, among which a name stands for its list.
        The "{c}" of CLIP_benchmark's files is read as "{}".

    Raises:
      UserError: the file cannot be read, or a template lacks its "{}".
    """
    if isinstance(name_or_path, str | Path):
        named = _named_templates(str(name_or_path))
        templates = named or _read_strings(name_or_path, "templates")
    else:
        templates = [t for item in name_or_path for t in _named_templates(item) or [item]]
    return check_templates(templates)


def _named_templates(name: str) -> list[str]:
    """Return the list of that name; empty where there is none."""
    if name in TEMPLATES:
        return list(TEMPLATES[name])
    return list(shipped_templates().get(name, ()))


def check_templates(templates: Sequence[str]) -> list[str]:
    """Return the templates, or raise UserError that names the first one without its "{}".

    The "{c}" of CLIP_benchmark's files is read as "{}".
    """
    templates = [template.replace("{c}", "{}") for template in templates]
    if not templates:
        raise UserError('there are no templates: give at least one, such as "a photo of a {}."')
    for number, template in enumerate(templates, 1):
        if "{}" not in template:
            raise UserError(f'template {number}, {template!r}, has no "{{}}" for the class name')
    return templates


def _read_strings(path: str | Path, what: str) -> list[str]:
    """Read a JSON list or one string a line; `what` names them in messages."""
    try:
        text = read_whole(str(path), MAX_BYTES).decode("utf-8-sig")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read {what} from {path}: {reason}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} in {path} are not UTF-8 (byte {error.start})") from error
    if str(path).endswith(".json"):
        try:
            strings = json.loads(text)
        except ValueError as error:
            raise UserError(f"{what} in {path} are not JSON: {error}") from error
        if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
            raise UserError(f"{what} in {path} must be one JSON list of strings")
    else:
        # Only line ends part names: other separators (U+2028, form feed) may stand inside one.
        strings = [line.strip() for line in text.removesuffix("\n").split("\n")]
    for number, string in enumerate(strings, 1):
        if not string.strip():
            raise UserError(f"{what} in {path}: number {number} of {len(strings)} is empty")
    return strings
