"""Fonts for the texts of a drawn page: the system's where Pillow's own lacks their characters."""

import contextlib
import functools
import io
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import ImageFont, features

from clip_jax.errors import note

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Debian's and Ubuntu's packages by the first word of a character's name; others are in the last.
_PACKAGES = {
    "CJK": "fonts-noto-cjk",
    "HIRAGANA": "fonts-noto-cjk",
    "KATAKANA": "fonts-noto-cjk",
    "HANGUL": "fonts-noto-cjk",
}
_OTHER_PACKAGES = "fonts-noto-core and fonts-symbola"
# Words in the file names of fonts that are taken last.
_STYLES = ("bold", "italic", "oblique", "mono", "light", "black", "thin", "condensed", "serif")
_SHOWN = 12


class PageFonts:
    """The fonts of the texts of a page: the built-in one where it has a text's characters.

    Args:
      texts: all that will be drawn.
      size: pixels.
    """

    def __init__(self, texts: Iterable[str], size: int):
        self._size = size
        self._drawn = frozenset[str]().union(*map(_visible, texts))
        self._fonts = dict(_fonts_with(self._drawn - _builtin_characters()))

    def font_of(self, text: str) -> Font:
        """Return the font that has the most of a text's characters."""
        path = self._path_of(text)
        if path is None:
            return ImageFont.load_default(self._size)
        return ImageFont.truetype(path, self._size)

    def tell_missing(self, page: Path) -> None:
        """Say once which characters no font has, and whether a script is drawn unshaped."""
        covered = _builtin_characters().union(*self._fonts.values())
        missing = sorted(self._drawn - covered)
        if missing:
            shown = " ".join(missing[:_SHOWN])
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            packages = sorted({_package(c) for c in missing})
            note(
                f"{page}: no font of this machine has {shown}{more}, and they are drawn as boxes; "
                f"install one, on Debian and Ubuntu {', '.join(packages)}"
            )
        right_to_left = {c for c in self._drawn if unicodedata.bidirectional(c) in ("R", "AL")}
        if right_to_left and not (features.check("raqm") and features.check("fribidi")):
            note(
                f"{page}: right-to-left text is drawn from left to right, its letters unjoined; "
                "install libfribidi (Debian and Ubuntu: libfribidi0), which Pillow then finds"
            )

    def _path_of(self, text: str) -> str | None:
        """Return the file of the font for a text; None is the built-in one."""
        drawn = _visible(text)
        if drawn <= _builtin_characters():
            return None
        others = drawn - _builtin_characters()
        path = max(self._fonts, key=lambda p: len(others & self._fonts[p]), default=None)
        return path if path is not None and others & self._fonts[path] else None


def _visible(text: str) -> frozenset[str]:
    """Return the characters of a text that leave ink; controls and variation selectors do not."""
    return frozenset(
        c for c in text if unicodedata.category(c)[0] not in "CZ" and not "\ufe00" <= c <= "\ufe0f"
    )


@functools.cache
def _builtin_characters() -> frozenset[str]:
    """Return the characters of Pillow's own font; ASCII where it cannot be looked into."""
    font = ImageFont.load_default(10)
    data = (
        getattr(font, "font_bytes", None)
        or getattr(getattr(font, "path", None), "getvalue", bytes)()
    )
    characters = _charmap(io.BytesIO(data)) if data else frozenset()
    return characters or frozenset(map(chr, range(32, 127)))


def _charmap(file: str | io.BytesIO) -> frozenset[str]:
    """Return the characters of a font; none where it is no scalable font."""
    # A second to import: only where a page is drawn.
    from matplotlib.ft2font import FT2Font

    with contextlib.suppress(RuntimeError, OSError, ValueError):
        return frozenset(map(chr, FT2Font(file).get_charmap()))
    return frozenset()


def _fonts_with(wanted: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield the fonts that have some of these characters, plain ones first, and which they have."""
    if not wanted:
        return
    for path in _font_files():
        found = _charmap(path) & wanted
        if found:
            # A font of color images (emoji) has no outlines to scale.
            with contextlib.suppress(OSError):
                ImageFont.truetype(path, 14)
                yield path, found


def _font_files() -> list[str]:
    """Return the fonts of the system and the one that matplotlib brings (Arabic, Cyrillic, ...)."""
    from matplotlib import font_manager, get_data_path

    def rank(path: str) -> tuple[bool, str]:
        return any(style in Path(path).stem.lower() for style in _STYLES), path

    brought = Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return [str(brought), *sorted(font_manager.findSystemFonts(), key=rank)]


def _package(character: str) -> str:
    return _PACKAGES.get(unicodedata.name(character, "?").split()[0], _OTHER_PACKAGES)
