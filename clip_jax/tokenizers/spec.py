"""Describe a tokenizer so that it can be stored beside weights and built again."""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from clip_jax.errors import UserError
from clip_jax.tokenizers.clean import get_cleaner
from clip_jax.tokenizers.clip_bpe import make_clip_tokenizer
from clip_jax.tokenizers.huggingface import make_hf_tokenizer
from clip_jax.tokenizers.sentencepiece import make_sentencepiece_tokenizer
from clip_jax.typing import Tokenizer

Kind = Literal["clip", "sentencepiece", "huggingface"]
KINDS: tuple[str, ...] = get_args(Kind)
SUFFIXES: dict[str, Kind] = {".model": "sentencepiece", ".json": "huggingface"}


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer's kind, file and settings.

    Attributes:
      kind: "clip" (OpenAI's BPE, which needs nothing else), "sentencepiece" or "huggingface".
      file: the `.model` or `tokenizer.json`.
      clean: a name of `clean.CLEANERS`, applied before the tokenizer's own normalization.
      sot_id, eot_id: set around the pieces instead of the file's template ("huggingface").
      pad_id: fills rows; None takes the file's.
      strip_sep: the end token becomes 0 ("huggingface"; CLIPA).
    """

    kind: Kind = "clip"
    file: str | None = None
    clean: str = "none"
    sot_id: int | None = None
    eot_id: int | None = None
    pad_id: int | None = None
    strip_sep: bool = False


# The fields that each kind reads; the others keep their defaults.
FIELDS: dict[str, tuple[str, ...]] = {
    "clip": (),
    "sentencepiece": ("file", "clean", "pad_id"),
    "huggingface": ("file", "clean", "sot_id", "eot_id", "pad_id", "strip_sep"),
}


def tokenizer_spec(name_or_path: str) -> TokenizerSpec:
    """Return the description of a config's tokenizer: "clip", an "x.model" or a "tokenizer.json".

    Raises:
      UserError: it is any other name.
    """
    kind = SUFFIXES.get(Path(name_or_path).suffix)
    if name_or_path == "clip":
        return TokenizerSpec()
    if kind is not None:
        return TokenizerSpec(kind, name_or_path)
    raise UserError(
        f'unknown tokenizer {name_or_path!r}: use "clip", the path of a SentencePiece .model '
        "file, or the path of a tokenizer.json"
    )


def make_tokenizer(
    name_or_spec: str | TokenizerSpec, *, folder: str | Path | None = None
) -> Tokenizer:
    """Return the tokenizer of a config or of a checkpoint.

    Args:
      name_or_spec: "clip", the path of a SentencePiece `.model` or of a `tokenizer.json`, or a
        description.
      folder: where a file lies whose path is not absolute; the working folder if None.

    Raises:
      UserError: it is any other name, or the file is missing or damaged.

    >>> make_tokenizer("clip")(["a red heart"], 6)
    array([[49406,   320,   736,  1936, 49407,     0]], dtype=int32)
    """
    spec = tokenizer_spec(name_or_spec) if isinstance(name_or_spec, str) else name_or_spec
    check_spec(spec, "the tokenizer")
    if spec.kind == "clip":
        return make_clip_tokenizer()
    path = Path(folder or "") / str(spec.file)
    if spec.kind == "sentencepiece":
        return make_sentencepiece_tokenizer(path, pad_id=spec.pad_id, clean=spec.clean)
    return make_hf_tokenizer(
        path,
        clean=spec.clean,
        sot_id=spec.sot_id,
        eot_id=spec.eot_id,
        pad_id=spec.pad_id,
        strip_sep=spec.strip_sep,
    )


def spec_to_json(spec: TokenizerSpec) -> dict[str, Any]:
    """Return a plain dict that `json` can write: the kind, and what differs from the defaults."""
    fields = dataclasses.asdict(spec)
    defaults = dataclasses.asdict(TokenizerSpec())
    return {k: v for k, v in fields.items() if k == "kind" or v != defaults[k]}


def spec_digest(spec: TokenizerSpec) -> str:
    """Return a digest of what a tokenizer does: of its settings and its file's content."""
    state = hashlib.blake2b(digest_size=16)
    state.update(repr(dataclasses.replace(spec, file=None)).encode())
    if spec.file is not None:
        state.update(Path(spec.file).read_bytes())
    return state.hexdigest()


def spec_from_json(fields: Any, *, where: str = "tokenizer") -> TokenizerSpec:
    """Return the description in a dict of `spec_to_json`; a string is a config's tokenizer.

    Args:
      fields: the values that `json` read.
      where: the file or section, for messages.

    Raises:
      UserError: it has an unknown field, or a value that makes no sense.
    """
    if isinstance(fields, str):
        return tokenizer_spec(fields)
    names = {field.name for field in dataclasses.fields(TokenizerSpec)}
    if not isinstance(fields, Mapping) or not set(fields) <= names:
        raise UserError(f"{where} is {fields!r:.80}: its fields are {', '.join(sorted(names))}")
    spec = TokenizerSpec(**fields)
    check_spec(spec, where)
    return spec


def check_spec(spec: TokenizerSpec, where: str) -> None:
    """Raise UserError if a field has no meaning, or none for this kind."""
    if spec.kind not in KINDS:
        raise UserError(f"{where}.kind is {spec.kind!r:.80}: use one of {', '.join(KINDS)}")
    for name in ("sot_id", "eot_id", "pad_id"):
        value = getattr(spec, name)
        if value is not None and not (type(value) is int and 0 <= value < 2**31):
            raise UserError(f"{where}.{name} is {value!r:.80}: it must be an id or null")
    if type(spec.strip_sep) is not bool or not isinstance(spec.clean, str):
        raise UserError(f"{where} has a strip_sep that is no boolean or a clean that is no name")
    get_cleaner(spec.clean)
    unknown = set(spec_to_json(spec)) - {"kind", *FIELDS[spec.kind]}
    if unknown:
        raise UserError(f"{where} of kind {spec.kind!r} takes no {', '.join(sorted(unknown))}")
    if spec.kind != "clip" and not (isinstance(spec.file, str) and spec.file):
        raise UserError(f"{where} of kind {spec.kind!r} needs a file and has {spec.file!r:.80}")
