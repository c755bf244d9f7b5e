"""Tokenize as CLIP does: lower-cased byte-pair encoding, 49,408 ids.

Gives the ids of OpenAI's `clip.tokenize` (openai/CLIP `clip/simple_tokenizer.py`) for every Unicode
text. Text is cleaned and split into words in Python, because the Rust library's regular expressions
follow another Unicode version than the `regex` package (17,145 code points split differently);
each new word is merged in Rust and then cached, and so is each chunk, what stands between spaces.
"""

import gzip
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import regex
from tokenizers.models import BPE

from clip_jax.tokenizers.clean import basic_clean, is_plain
from clip_jax.tokenizers.rows import fill_rows, ids_before_end, ids_to_bytes

MERGES_PATH = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
# The file holds more merges than the vocabulary has room for: the first 48,894 belong to CLIP.
NUM_MERGES = 49_408 - 2 * 256 - 2
START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"

WORD = regex.compile(
    rf"{regex.escape(START)}|{regex.escape(END)}"
    r"|'(?:s|t|re|ve|m|ll|d)"
    r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
# The same words of a cleaned text of ASCII alone, where a space is the only white space left.
ASCII_WORD = re.compile(
    rf"{re.escape(START)}|{re.escape(END)}|'(?:s|t|re|ve|m|ll|d)|[a-z]+|[0-9]|[^ a-z0-9]+"
)
WHITESPACE = regex.compile(r"\s+")

# Bounds on the cache of chunks and words; so many of eight letters take 18 MB.
MAX_CACHED = 1 << 17
MAX_CACHED_LENGTH = 64


def byte_units() -> list[str]:
    """Return the printable character that stands for each of the 256 bytes in the merges file.

    Printable Latin-1 bytes stand for themselves, the others for the characters from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("ÿ") + 1)} - {0xAD}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def read_merges() -> list[tuple[str, str]]:
    """Return the pairs of pieces that CLIP merges, the most frequent first."""
    lines = gzip.decompress(MERGES_PATH.read_bytes()).decode("utf-8").split("\n")
    pairs = (line.split() for line in lines[1 : NUM_MERGES + 1])
    return [(first, second) for first, second in pairs]


def clean(text: str) -> list[str]:
    """Undo mojibake and HTML entities, lower the case, and split at white space."""
    if is_plain(text):
        return text.lower().split()
    # Not `str.split`, whose white space is not the word pattern's.
    return WHITESPACE.sub(" ", basic_clean(text)).strip().lower().split(" ")


def vocabulary(merges: Sequence[tuple[str, str]]) -> list[str]:
    """Return the pieces in the order of their ids, special tokens left out.

    Ids 0-255 follow the order of the characters, not of the bytes they stand for.
    """
    singles = sorted(byte_units())
    pieces = singles + [unit + END_OF_WORD for unit in singles]
    return pieces + [first + second for first, second in merges]


class ClipTokenizer:
    """The `Tokenizer` of CLIP; its rows are start token, words, end token, zeros.

    Thread-safe; pickles as a call to `make_clip_tokenizer`, so that loader processes can have one.
    """

    def __init__(self, max_cached: int = MAX_CACHED):
        merges = read_merges()
        self._units = byte_units()
        pieces = vocabulary(merges)
        self._bpe = BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            end_of_word_suffix=END_OF_WORD,
        )
        self.vocab_size = len(pieces) + 2
        self.sot_id = len(pieces)
        self.eot_id = len(pieces) + 1
        self.pad_id = 0
        byte_of = {unit: byte for byte, unit in enumerate(self._units)}
        self._piece_bytes = [
            bytes(byte_of[unit] for unit in piece.removesuffix(END_OF_WORD))
            + b" " * piece.endswith(END_OF_WORD)
            for piece in pieces
        ]
        # A caption may spell a special token out; OpenAI's tokenizer then gives its id.
        self._special = {START: self.sot_id, END: self.eot_id}
        self._start = ids_to_bytes([self.sot_id])
        self._ids_of = _Cache(self._encode_chunk, max_cached)

    def __call__(self, texts: Sequence[str], context_length: int = 77) -> np.ndarray:
        """Return token ids, int32 [batch, context_length]; a text too long keeps its end token."""
        texts = [texts] if isinstance(texts, str) else texts
        rows = [self._start + self._encode(text) for text in texts]
        return fill_rows(rows, context_length, eot_id=self.eot_id, pad_id=self.pad_id)

    def __reduce__(self):
        return make_clip_tokenizer, ()

    def encode(self, text: str) -> list[int]:
        """Return the ids of the words alone: no start token, no end token, no length limit."""
        return list(memoryview(self._encode(text)).cast("i"))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of a row of ids up to its end token, a space after each word."""
        words = [i for i in ids_before_end(ids, self.eot_id) if i != self.sot_id]
        pieces = [self._piece_bytes[i] for i in words]
        return b"".join(pieces).decode("utf-8", errors="replace").strip()

    def _encode(self, text: str) -> bytes:
        # No word has a space in it, and captions share most of their chunks.
        return b"".join(map(self._ids_of.__getitem__, clean(text)))

    def _encode_chunk(self, chunk: str) -> bytes:
        """Return the ids of the words of a text without spaces."""
        words = (ASCII_WORD if chunk.isascii() else WORD).findall(chunk)
        if words != [chunk]:
            return b"".join(map(self._ids_of.__getitem__, words))
        if chunk in self._special:
            return ids_to_bytes([self._special[chunk]])
        units = "".join(self._units[byte] for byte in chunk.encode("utf-8"))
        return ids_to_bytes(token.id for token in self._bpe.tokenize(units))


class _Cache(dict[str, bytes]):
    """The ids of chunks, found when they are asked for; all go when it is full."""

    def __init__(self, encode: Callable[[str], bytes], limit: int):
        super().__init__()
        self._encode, self._limit = encode, limit

    def __missing__(self, chunk: str) -> bytes:
        ids = self._encode(chunk)
        if len(chunk) <= MAX_CACHED_LENGTH:
            if len(self) >= self._limit:
                self.clear()
            self[chunk] = ids
        return ids


def make_clip_tokenizer() -> ClipTokenizer:
    """Return the tokenizer of every OpenAI and open_clip CLIP model (vocabulary 49,408)."""
    return ClipTokenizer()
