"""Tokenize by a Hugging Face `tokenizer.json`, read by the Rust library `tokenizers` alone.

CLIPA (BERT's WordPiece), MetaCLIP 2 (XLM-V, mT5) and SigLIP 2 (Gemma) have them. The ids are those
of open_clip's `HFTokenizer`: padded to the context length, cut before the end token.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tokenizers

from clip_jax.errors import UserError
from clip_jax.tokenizers.clean import get_cleaner, replace_surrogates
from clip_jax.tokenizers.rows import fill_rows, ids_before_end, ids_to_bytes

T = TypeVar("T")

# XLM-V's file, the largest in use, has 900,000 pieces and about 60 MB.
MAX_FILE_BYTES = 512 << 20
PAD_NAMES = ("[PAD]", "<pad>")
PROBE = "a"


class HuggingFaceTokenizer:
    """The `Tokenizer` of a `tokenizer.json`; its rows are start token (if any), pieces, end, pads.

    Thread-safe, and pickles with the file inside, so that loader processes can have one.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        sot_id: int | None,
        end_id: int,
        pad_id: int,
        vocab_size: int,
        clean: str,
        uses_template: bool,
        strip_sep: bool,
    ):
        self._tokenizer = tokenizer
        self._sot = [] if sot_id is None else [sot_id]
        self._end_id = end_id
        self._uses_template = uses_template
        self._strip_sep = strip_sep
        self._clean = get_cleaner(clean)
        self.vocab_size = vocab_size
        self.pad_id = pad_id
        self.eot_id = 0 if strip_sep else end_id

    def __call__(self, texts: Sequence[str], context_length: int = 77) -> np.ndarray:
        """Return token ids, int32 [batch, context_length]; a text too long keeps its end token."""
        texts = [texts] if isinstance(texts, str) else texts
        cleaned = [replace_surrogates(self._clean(text)) for text in texts]
        encoded = call_rust(
            lambda: self._tokenizer.encode_batch(cleaned, add_special_tokens=self._uses_template),
            "the tokenizer cannot encode these texts",
        )
        if self._uses_template:  # the file's template ends in one token, which `fill_rows` sets
            rows = [ids_to_bytes(encoding.ids[:-1]) for encoding in encoded]
        else:
            rows = [ids_to_bytes(self._sot + encoding.ids) for encoding in encoded]
        tokens_BL = fill_rows(rows, context_length, eot_id=self._end_id, pad_id=self.pad_id)
        if self._strip_sep:
            tokens_BL[tokens_BL == self._end_id] = 0
        return tokens_BL

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of a row of ids, up to its end token, as the file's decoder joins it."""
        pieces = ids_before_end(ids, self.eot_id)
        return self._tokenizer.decode(pieces, skip_special_tokens=True)


def make_hf_tokenizer(
    path: str | Path,
    *,
    clean: str = "none",
    sot_id: int | None = None,
    eot_id: int | None = None,
    pad_id: int | None = None,
    strip_sep: bool = False,
) -> HuggingFaceTokenizer:
    """Return the tokenizer of a `tokenizer.json`; every id is the file's own.

    Args:
      path: the file.
      clean: a name of `clean.CLEANERS`, applied first. open_clip's default is "whitespace".
      sot_id, eot_id: with an `eot_id`, rows are `sot_id` (if given), pieces, `eot_id`, whatever
        the file's template has; without one the template decides, and must end in one token.
      pad_id: fills rows behind the end token. None takes the file's padding, then "[PAD]" or
        "<pad>", then the end token.
      strip_sep: the end token becomes 0, as CLIPA wants it (`eot_id` is 0 then).

    Raises:
      UserError: the file is missing or damaged, adds no end token, or lacks an id.
    """
    get_cleaner(clean)
    tokenizer = read_tokenizer_json(path)
    vocab = call_rust(lambda: tokenizer.get_vocab(with_added_tokens=True), f"{path} is damaged")
    vocab_size = 1 + max(vocab.values(), default=-1)
    padding = tokenizer.padding or {}
    tokenizer.no_padding()
    tokenizer.no_truncation()
    end_id = template_end(tokenizer, vocab_size, path) if eot_id is None else eot_id
    if pad_id is None:
        named = (vocab[name] for name in PAD_NAMES if name in vocab)
        pad_id = padding.get("pad_id", next(named, end_id))
    for name, index in ("sot_id", sot_id), ("eot_id", end_id), ("pad_id", pad_id):
        if index is not None and not 0 <= index < vocab_size:
            raise UserError(f"{name} {index} is outside the {vocab_size} ids of {path}")
    if vocab_size > 2**31 - 1:
        raise UserError(f"{path} has ids up to {vocab_size - 1}, beyond int32: it is damaged")
    return HuggingFaceTokenizer(
        tokenizer,
        sot_id=sot_id,
        end_id=end_id,
        pad_id=pad_id,
        vocab_size=vocab_size,
        clean=clean,
        uses_template=eot_id is None,
        strip_sep=strip_sep,
    )


def read_tokenizer_json(path: str | Path) -> tokenizers.Tokenizer:
    """Return the tokenizer of a file as the Rust library reads it.

    Raises:
      UserError: the file is missing, too large or damaged.
    """
    path = Path(path)
    text = read_text(path)
    check_merges(parse_json(text, path), path)
    return call_rust(
        lambda: tokenizers.Tokenizer.from_str(text), f"{path} is not a tokenizer.json to read"
    )


def read_text(path: Path) -> str:
    """Return the text of a tokenizer's file.

    Raises:
      UserError: it is missing, too large, or no UTF-8.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(
                f"{path} has more than {MAX_FILE_BYTES >> 20} MiB: no tokenizer has; fetch it again"
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError)
        remedy = "fetch it again" if is_missing else "make it a file that you may read"
        raise UserError(f"cannot read {path}: {error.strerror}; {remedy}") from error
    except UnicodeError as error:
        raise UserError(f"{path} is damaged: it is no UTF-8 text; fetch it again") from error


def parse_json(text: str, path: Path) -> Any:
    """Return the value in the text of a file.

    Raises:
      UserError: it is no JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {str(error)[:200]}; fetch it again") from error


def check_merges(content: Any, path: Path) -> None:
    """Raise UserError if the merges of a BPE do not carry the prefix that it states.

    The library (0.23) cuts the prefix off blindly, in the middle of a character, and then ends the
    whole process while it reports that.
    """
    model = content.get("model") if isinstance(content, dict) else None
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    merges = model.get("merges") if isinstance(model, dict) else None
    if not prefix or not isinstance(prefix, str) or not isinstance(merges, list):
        return
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        good = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], str)
        if not good or not pair[1].startswith(prefix):
            raise UserError(
                f"{path} is damaged: the merge {merge!r:.50} lacks the prefix {prefix!r}"
            )


def template_end(tokenizer: tokenizers.Tokenizer, vocab_size: int, path: str | Path) -> int:
    """Return the one token that the file's template sets behind every text.

    Raises:
      UserError: the template sets none, or several, or one outside of the vocabulary.
    """
    probe = call_rust(lambda: tokenizer.encode(PROBE), f"{path} cannot encode {PROBE!r}")
    ids, special = probe.ids, probe.special_tokens_mask
    # The mask tells the template's tokens from those of the text.
    if 0 not in special or special[-1] != 1 or special[-2] == 1:
        raise UserError(
            f"{path} sets {'no' if not special or special[-1] == 0 else 'an unclear'} end token "
            "behind a text, which a text tower needs: give its eot_id"
        )
    if max(ids) >= vocab_size:
        raise UserError(f"{path} is damaged: its template adds id {max(ids)} of {vocab_size}")
    return ids[-1]


def call_rust(call: Callable[[], T], message: str) -> T:
    """Return the value of a call into the Rust library, whose errors become one line.

    A panic in Rust comes as a BaseException that is no Exception.
    """
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, GeneratorExit, TypeError, AttributeError, NameError):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{message}: {reason}") from None
