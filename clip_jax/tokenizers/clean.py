"""What happens to a text before a tokenizer's own normalization; the weights decide which one.

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
    """Printable ASCII without "&", in which nothing is to be mended."""
    return text.isascii() and text.isprintable() and "&" not in text


def mend(text: str) -> str:
    """Mojibake and HTML entities undone, the ends stripped."""
    # ftfy is nine tenths of a tokenizer's time where it has nothing to do.
    if not is_plain(text):
        # Web pages escape twice: "&amp;amp;".
        text = _unescape(_unescape(ftfy.fix_text(text)))
    return text.strip()


def whitespace(text: str) -> str:
    """Mended, white space collapsed."""
    return " ".join(mend(text).split())


def lower(text: str) -> str:
    """Mended, white space collapsed, lower case."""
    return whitespace(text).lower()


def canonicalize(text: str) -> str:
    """Mended, "_" to a space, ASCII punctuation out, lower case, white space collapsed."""
    text = mend(text).replace("_", " ").translate(_NO_PUNCTUATION)
    return " ".join(text.lower().split())


CLEANERS: dict[str, Callable[[str], str]] = {
    "none": str,
    "whitespace": whitespace,
    "lower": lower,
    "canonicalize": canonicalize,
}


def cleaner(name: str) -> Callable[[str], str]:
    """The function of that name. Raises UserError for any other name."""
    if name not in CLEANERS:
        raise UserError(f"clean={name!r} is unknown: use one of {', '.join(CLEANERS)}")
    return CLEANERS[name]


def encodable(text: str) -> str:
    """The text with "?" for lone surrogates, which have no UTF-8 form and make libraries raise."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _unescape(text: str) -> str:
    """`html.unescape`, which raises on a numeric entity of more digits than `int` reads."""
    try:
        return html.unescape(text)
    except ValueError:
        return text
