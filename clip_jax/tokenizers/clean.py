"""Clean a text before a tokenizer's own normalization; the weights decide in which way.

The four names and their results are open_clip's (`open_clip/tokenizer.py`, 3.3), which follows
OpenAI in mending mojibake and HTML first, and big_vision in `canonicalize`. Hugging Face's
`SiglipTokenizer` mends nothing and drops "_" where `canonicalize` makes it a space; SigLIP was
trained with big_vision's form, so that is the one here.
"""

import html
import string
from collections.abc import Callable

import ftfy

from clip_jax.errors import UserError

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def is_plain(text: str) -> bool:
    """Return whether it is printable ASCII without "&", in which nothing is to be mended."""
    return text.isascii() and text.isprintable() and "&" not in text


def basic_clean(text: str) -> str:
    """Undo mojibake and HTML entities, and strip the ends."""
    # ftfy is nine tenths of a tokenizer's time where it has nothing to do.
    if not is_plain(text):
        # Web pages escape twice: "&amp;amp;".
        text = _unescape(_unescape(ftfy.fix_text(text)))
    return text.strip()


def whitespace(text: str) -> str:
    """Mend the text and collapse its white space."""
    return " ".join(basic_clean(text).split())


def lower(text: str) -> str:
    """Mend the text, collapse its white space and lower its case."""
    return whitespace(text).lower()


def canonicalize(text: str) -> str:
    """Mend the text, make "_" a space, drop ASCII punctuation, lower case, collapse white space."""
    text = basic_clean(text).replace("_", " ").translate(_NO_PUNCTUATION)
    return " ".join(text.lower().split())


CLEANERS: dict[str, Callable[[str], str]] = {
    "none": str,
    "whitespace": whitespace,
    "lower": lower,
    "canonicalize": canonicalize,
}


def get_cleaner(name: str) -> Callable[[str], str]:
    """Return the function of that name.

    Raises:
      UserError: there is none.
    """
    if name not in CLEANERS:
        raise UserError(f"clean={name!r} is unknown: use one of {', '.join(CLEANERS)}")
    return CLEANERS[name]


def replace_surrogates(text: str) -> str:
    """Put "?" for lone surrogates, which have no UTF-8 form and make libraries raise."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _unescape(text: str) -> str:
    """Call `html.unescape`, which raises on a numeric entity of more digits than `int` reads."""
    try:
        return html.unescape(text)
    except ValueError:
        return text
