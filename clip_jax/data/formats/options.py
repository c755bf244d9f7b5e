"""The options behind the `#` of a source: `pairs.csv#image=file&caption=title`."""

import dataclasses
import re

from clip_jax.errors import UserError, check_choice


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of one source; where a field is empty, the usual names are looked for."""

    image: str = ""
    """Column or feature of the image: its bytes, or its path."""
    caption: str = ""
    """Column, feature or JSON key of the caption."""
    label: str = ""
    """Column or feature of the class number."""
    root: str = ""
    """Folder or URL that relative paths start from; the file's own when empty."""
    split: str = "train"
    """Of a TFDS set."""
    template: str = ""
    """Sentences joined by `|` in which `{}` is the caption or the class name."""
    txt: str = "lines"
    """Of `.txt` files: "lines" takes each line for a caption, "whole" the file for one."""

    @property
    def templates(self) -> tuple[str, ...]:
        """The sentences; the bare name if none is given."""
        return tuple(self.template.split("|")) if self.template else ("{}",)

    @property
    def whole_txt(self) -> bool:
        """Whether a `.txt` file is one caption."""
        return self.txt == "whole"


NO_OPTIONS = Options()
_NAMES = tuple(field.name for field in dataclasses.fields(Options))


def split_options(source: str) -> tuple[str, Options]:
    """Return a source without its options, and the options.

    Raises:
      UserError: an unknown option or value, one that comes twice, or a template without {}.
    """
    path, hash_, tail = source.partition("#")
    if not hash_ or not re.match(r"\w+=", tail):
        return source, NO_OPTIONS  # a # in a file name
    values: dict[str, str] = {}
    for item in tail.split("&"):
        name, _, value = item.partition("=")
        if name not in _NAMES:
            raise UserError(f"{source!r}: option {name!r} is not among {', '.join(_NAMES)}")
        if name in values:
            raise UserError(f"{source!r} gives {name} twice: give it once")
        values[name] = value
    options = Options(**values)
    check_choice(f"{source!r}: option 'txt'", options.txt, ("lines", "whole"))
    bad = [t for t in options.templates if "{}" not in t]
    if bad:
        raise UserError(f"{source!r}: template {bad[0]!r} needs a {{}} for the caption")
    return path, options
