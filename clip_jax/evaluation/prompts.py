"""Class names and prompt templates from files."""

import json
from collections.abc import Sequence
from pathlib import Path

from clip_jax.errors import UserError

# Named lists for configs and commands; any other name is a file's path.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "name": ("{}",),
    "photo": ("a photo of a {}.",),
}


def load_class_names(path: str | Path) -> list[str]:
    """Class names in label order, from a JSON list or a text file with one name a line.

    Raises UserError when the file cannot be read or a name is empty.
    """
    return _read_strings(Path(path), "class names")


def load_templates(name_or_path: str | Path | Sequence[str]) -> list[str]:
    """Prompt templates with "{}" for the class name.

    Args:
      name_or_path: a name in `TEMPLATES`, a JSON list or text file, or the templates themselves.
        The "{c}" of CLIP_benchmark's files is read as "{}".

    Raises UserError when the file cannot be read or a template lacks its "{}".
    """
    if isinstance(name_or_path, str) and name_or_path in TEMPLATES:
        templates = list(TEMPLATES[name_or_path])
    elif isinstance(name_or_path, str | Path):
        templates = _read_strings(Path(name_or_path), "templates")
    else:
        templates = list(name_or_path)
    return check_templates([template.replace("{c}", "{}") for template in templates])


def check_templates(templates: Sequence[str]) -> list[str]:
    """The templates, each with its "{}"; UserError names the first one without."""
    if not templates:
        raise UserError('there are no templates: give at least one, such as "a photo of a {}."')
    for number, template in enumerate(templates, 1):
        if "{}" not in template:
            raise UserError(f'template {number}, {template!r}, has no "{{}}" for the class name')
    return list(templates)


def _read_strings(path: Path, what: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {what} from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} in {path} are not UTF-8 (byte {error.start})") from error
    if path.suffix == ".json":
        try:
            strings = json.loads(text)
        except ValueError as error:
            raise UserError(f"{what} in {path} are not JSON: {error}") from error
        if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
            raise UserError(f"{what} in {path} must be one JSON list of strings")
    else:
        # Only line ends part names: other separators (U+2028, form feed) may stand inside one.
        strings = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    for number, string in enumerate(strings, 1):
        if not string.strip():
            raise UserError(f"{what} in {path}: number {number} of {len(strings)} is empty")
    return strings
