"""The tokenizer of a folder as Hugging Face and open_clip publish them, from the files in it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError
from clip_jax.tokenizers.clip_bpe import END, START, read_merges, vocabulary
from clip_jax.tokenizers.huggingface import (
    MAX_FILE_BYTES,
    guarded,
    make_hf_tokenizer,
    read_tokenizer_json,
)
from clip_jax.tokenizers.sentencepiece import make_sentencepiece_tokenizer, piece_ids
from clip_jax.tokenizers.spec import TokenizerSpec, tokenizer_spec

SENTENCEPIECE_FILES = ("spiece.model", "tokenizer.model")
# Files that name a tokenizer and do not suffice: BERT's words lack the rules, XLM-R's model has
# other ids than the tokenizer, and a BPE that is not OpenAI's lacks its way of splitting.
INSUFFICIENT = ("vocab.txt", "sentencepiece.bpe.model", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Family:
    """What the models of a family were trained with, where their folders do not say.

    Attributes:
      clean: see `clean.CLEANERS`.
      pad: the token that pads; None leaves it to the files.
      strip_sep: see `TokenizerSpec`.
    """

    clean: str = "whitespace"
    pad: str | None = None
    strip_sep: bool = False


# From open_clip's model_configs and its `SigLipTokenizer`; MetaCLIP 2's L/14 (mT5) alone
# canonicalises, which its config says.
FAMILIES = {
    "clip": Family(),
    "siglip": Family("canonicalize", "</s>"),
    "siglip2": Family("canonicalize", "<pad>"),
    "clipa": Family(pad="[PAD]", strip_sep=True),
    "metaclip2": Family(),
}
# Hugging Face's classes that settle the family.
CLASSES = {"SiglipTokenizer": "siglip", "Siglip2Tokenizer": "siglip2"}


def tokenizer_from_folder(
    folder: str | Path,
    family: str | None = None,
    *,
    clean: str | None = None,
    strip_sep: bool | None = None,
) -> TokenizerSpec | None:
    """The tokenizer whose files lie in a folder; None when there are none.

    Looks for CLIP's own BPE first (by content: `vocab.json` and `merges.txt`, or `tokenizer.json`),
    then `tokenizer.json`, `spiece.model`, `tokenizer.model`. Of `tokenizer_config.json` it reads
    `tokenizer_class`, `pad_token`, `add_bos_token`, `add_eos_token` and the sides.

    Args:
      folder: where the files lie.
      family: a name of `FAMILIES`; None goes by `tokenizer_class`, else open_clip's defaults.
      clean, strip_sep: open_clip's `tokenizer_kwargs`, which outdo the family's.

    Raises UserError for a damaged file, and for a tokenizer that no text tower here can read.
    """
    folder = Path(folder)
    config = _read_json(folder / "tokenizer_config.json", optional=True)
    tokenizer_class = str(config.get("tokenizer_class")).removesuffix("Fast")
    family = family or CLASSES.get(tokenizer_class, "clip")
    if family not in FAMILIES:
        raise UserError(f"family {family!r} is unknown: use one of {', '.join(FAMILIES)}")
    if is_openai_bpe(folder):
        return TokenizerSpec()
    for side in ("padding_side", "truncation_side"):
        if config.get(side, "right") != "right":
            raise UserError(f"{folder}/tokenizer_config.json: {side} must be right")
    facts = FAMILIES[family]
    clean = facts.clean if clean is None else clean
    if (folder / "tokenizer.json").is_file():
        strip_sep = facts.strip_sep if strip_sep is None else strip_sep
        return _huggingface_spec(folder / "tokenizer.json", config, facts, clean, strip_sep)
    for name in SENTENCEPIECE_FILES:
        if (folder / name).is_file():
            return _sentencepiece_spec(folder / name, config, facts, clean)
    found = [name for name in INSUFFICIENT if (folder / name).is_file()]
    if found:
        raise UserError(
            f"{folder} has {' and '.join(found)}, which do not suffice for its tokenizer: save its "
            "tokenizer.json there (`AutoTokenizer.from_pretrained(...).save_pretrained(...)`)"
        )
    return None


def tokenizer_from_file(path: str | Path, family: str) -> TokenizerSpec:
    """A `tokenizer.json` or SentencePiece `.model`, used as a family of models was trained with it.

    Args:
      path: the file, or "clip" for CLIP's own BPE.
      family: a name of `FAMILIES`.

    Raises UserError for another ending, and for a file that is missing or damaged.
    """
    spec, facts = tokenizer_spec(str(path)), FAMILIES[family]
    if spec.kind == "clip":
        return spec
    if spec.kind == "sentencepiece":
        return _sentencepiece_spec(Path(path), {}, facts, facts.clean)
    return _huggingface_spec(Path(path), {}, facts, facts.clean, facts.strip_sep)


def is_openai_bpe(folder: Path) -> bool:
    """Whether the vocabulary and the merges in the folder are CLIP's own, entry for entry.

    Hugging Face's CLIP folders have them, with rules that leave mojibake and HTML as they are;
    the weights were trained with OpenAI's cleaning.
    """
    vocab_path, merges_path = folder / "vocab.json", folder / "merges.txt"
    json_path = folder / "tokenizer.json"
    if vocab_path.is_file() and merges_path.is_file():
        vocab: Any = _read_json(vocab_path)
        lines = _read_text(merges_path).split("\n")
        merges: Any = lines[1:] if lines and lines[0].startswith("#version") else lines
    elif json_path.is_file():
        content = _read_json(json_path)
        model = content.get("model")
        if not isinstance(model, Mapping) or not isinstance(model.get("merges"), list):
            return False
        vocab, merges = model.get("vocab"), model["merges"]
    else:
        return False
    if not isinstance(vocab, Mapping) or len(vocab) != 49_408:
        return False
    ours = read_merges()
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m or ()) for m in merges if m]
    pieces = [*vocabulary(ours), START, END]
    return pairs == ours and vocab == {piece: i for i, piece in enumerate(pieces)}


def _huggingface_spec(
    path: Path, config: Mapping[str, Any], facts: Family, clean: str, strip_sep: bool
) -> TokenizerSpec:
    tokenizer = read_tokenizer_json(path)

    def token_id(name: str) -> int | None:
        return guarded(lambda: tokenizer.token_to_id(name), f"{path} is damaged")

    sot_id = eot_id = None
    if "add_bos_token" in config or "add_eos_token" in config:
        # transformers then builds the template anew from these two.
        if not config.get("add_eos_token", False):
            raise UserError(
                f"{path.parent}/tokenizer_config.json: add_eos_token is off, and a text tower "
                "needs an end token"
            )
        eot_id = _id_of(_token(config, "eos_token") or "</s>", token_id, path)
        if config.get("add_bos_token", False):
            sot_id = _id_of(_token(config, "bos_token") or "<s>", token_id, path)
    spec = TokenizerSpec(
        "huggingface",
        str(path),
        clean=clean,
        sot_id=sot_id,
        eot_id=eot_id,
        pad_id=_pad_id(config, facts, token_id, path),
        strip_sep=strip_sep,
    )
    make_hf_tokenizer(
        path, clean=clean, sot_id=sot_id, eot_id=eot_id, pad_id=spec.pad_id, strip_sep=strip_sep
    )
    return spec


def _sentencepiece_spec(
    path: Path, config: Mapping[str, Any], facts: Family, clean: str
) -> TokenizerSpec:
    make_sentencepiece_tokenizer(path, clean=clean)
    pad_id = _pad_id(config, facts, piece_ids(path), path)
    return TokenizerSpec("sentencepiece", str(path), clean=clean, pad_id=pad_id)


def _pad_id(
    config: Mapping[str, Any], facts: Family, token_id: Callable[[str], int | None], path: Path
) -> int | None:
    """The id of the folder's padding, else of the family's; None leaves it to the tokenizer."""
    stated = _token(config, "pad_token")
    if stated is not None:
        return _id_of(stated, token_id, path)
    return None if facts.pad is None else token_id(facts.pad)


def _id_of(token: str, token_id: Callable[[str], int | None], path: Path) -> int:
    found = token_id(token)
    if found is None:
        raise UserError(f"{path} has no {token!r:.80}, which tokenizer_config.json names")
    return found


def _token(config: Mapping[str, Any], key: str) -> str | None:
    """A token of the config, which is a string or an object with the string as its content."""
    value = config.get(key)
    if isinstance(value, Mapping):
        value = value.get("content")
    if value is None or isinstance(value, str):
        return value
    raise UserError(f"tokenizer_config.json: {key} is {value!r:.80} and no token")


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{path} has more than {MAX_FILE_BYTES >> 20} MiB: no tokenizer has")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeError as error:
        raise UserError(f"{path} is damaged: it is no UTF-8 text") from error


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """A JSON object; empty for an optional file that is absent."""
    if optional and not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it must hold a JSON object")
    return value
