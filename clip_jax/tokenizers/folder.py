"""Find the tokenizer in a folder that Hugging Face or open_clip published, and write CLIP's."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError, note, note_unknown
from clip_jax.tokenizers.clip_bpe import END, START, read_merges, vocabulary
from clip_jax.tokenizers.huggingface import (
    call_rust,
    make_hf_tokenizer,
    parse_json,
    read_text,
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
    """The settings that the models of a family were trained with; folders may leave them out.

    Attributes:
      clean: see `clean.CLEANERS`.
      pad: the token that pads; None leaves it to the files.
      strip_sep: see `TokenizerSpec`.
      start: the token before every text, whatever the file's template has; None leaves both ends
        to the files.
    """

    clean: str = "whitespace"
    pad: str | None = None
    strip_sep: bool = False
    start: str | None = None


# From open_clip's model_configs and its `SigLipTokenizer`; MetaCLIP 2's L/14 (mT5) alone
# canonicalizes, which its config has.
FAMILIES = {
    "clip": Family(),
    "siglip": Family("canonicalize", "</s>"),
    "siglip2": Family("canonicalize", "<pad>"),
    "clipa": Family(pad="[PAD]", strip_sep=True),
    "metaclip2": Family(),
    # RoBERTa, XLM-RoBERTa and NLLB, whose padding is not seen. NLLB's language stands before a
    # text, as transformers has it; the templates of older files set it behind the end token.
    "encoder": Family(pad="<pad>"),
    "nllb": Family(pad="<pad>", start="eng_Latn"),
}
# Settings of `tokenizer_config.json` that are read, and after them those that change no id: of
# lengths, which the model has, of decoding, and of who wrote the file.
_KNOWN = {"tokenizer_class", "pad_token", "bos_token", "eos_token", "src_lang", "add_bos_token"}
_KNOWN |= {"add_eos_token", "padding_side", "truncation_side"}
_KNOWN |= {"model_max_length", "max_length", "truncation", "truncation_strategy", "padding"}
_KNOWN |= {"stride", "pad_to_multiple_of", "pad_token_type_id", "max_len", "pad_token_id"}
_KNOWN |= {"clean_up_tokenization_spaces", "errors", "chat_template", "return_tensors"}
_KNOWN |= {"name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file", "merges_file"}
_KNOWN |= {"auto_map", "processor_class", "use_fast", "from_slow", "backend", "is_local", "legacy"}
_KNOWN |= {"model_input_names", "return_attention_mask", "transformers_version", "tgt_lang"}
# Tokens that the other files of a folder hold with their ids.
_KNOWN |= {"unk_token", "mask_token", "cls_token", "sep_token", "additional_special_tokens"}
_KNOWN |= {"added_tokens_decoder", "extra_special_tokens", "extra_ids", "language_codes"}
# Settings of the text before it is cut, and their names in the normalizer of a `tokenizer.json`.
_NORMALIZING = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
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
    """Return the tokenizer whose files lie in a folder; None if there are none.

    Looks for CLIP's own BPE first (by content: `vocab.json` and `merges.txt`, or `tokenizer.json`),
    then `tokenizer.json`, `spiece.model`, `tokenizer.model`. Of `tokenizer_config.json` it reads
    `tokenizer_class`, `pad_token`, `add_bos_token`, `add_eos_token` and the sides.

    Args:
      folder: where the files lie.
      family: a name of `FAMILIES`; None goes by `tokenizer_class`, else open_clip's defaults.
      clean, strip_sep: open_clip's `tokenizer_kwargs`, which go before the family's.

    Raises:
      UserError: a file is damaged, or no text tower here can read such a tokenizer.
    """
    folder = Path(folder)
    config = _read_json(folder / "tokenizer_config.json", optional=True)
    tokenizer_class = str(config.get("tokenizer_class")).removesuffix("Fast")
    family = family or CLASSES.get(tokenizer_class, "clip")
    if family not in FAMILIES:
        raise UserError(f"family {family!r} is unknown: use one of {', '.join(FAMILIES)}")
    _tell_unknown(config, folder)
    if is_openai_bpe(folder):
        _tell_normalizing(config, {"lowercase": True}, folder)
        return TokenizerSpec()
    for side in ("padding_side", "truncation_side"):
        if config.get(side, "right") != "right":
            raise UserError(f"{folder}/tokenizer_config.json: {side} must be right")
    defaults = FAMILIES[family]
    clean = defaults.clean if clean is None else clean
    if (folder / "tokenizer.json").is_file():
        strip_sep = defaults.strip_sep if strip_sep is None else strip_sep
        return _huggingface_spec(folder / "tokenizer.json", config, defaults, clean, strip_sep)
    for name in SENTENCEPIECE_FILES:
        if (folder / name).is_file():
            return _sentencepiece_spec(folder / name, config, defaults, clean)
    insufficient = [name for name in INSUFFICIENT if (folder / name).is_file()]
    if insufficient:
        names = " and ".join(insufficient)
        raise UserError(
            f"{folder} has {names}, which do not suffice for its tokenizer: save its "
            "tokenizer.json there (`AutoTokenizer.from_pretrained(...).save_pretrained(...)`)"
        )
    return None


def _tell_unknown(config: Mapping[str, Any], folder: Path) -> None:
    """Say which settings of `tokenizer_config.json` are not read."""
    shown = {name: value for name, value in config.items() if not name.startswith("_")}
    # In CLIP's vocabulary no piece begins with a space, and a text is stripped first.
    known = {*_KNOWN, *_NORMALIZING, "add_prefix_space"}
    note_unknown(shown, known, f"{folder}/tokenizer_config.json")


def _tell_normalizing(
    config: Mapping[str, Any], normalizer: Mapping[str, Any], folder: Path
) -> None:
    """Say where the config would change a text otherwise than the normalizer that is used."""
    for name, key in _NORMALIZING.items():
        given = config.get(name)
        if given is not None and given != normalizer.get(key, given):
            note(
                f"{folder}/tokenizer_config.json: {name} is {given}, and the tokenizer's own "
                f"{key} = {normalizer[key]} is taken"
            )


def tokenizer_from_file(path: str | Path, family: str) -> TokenizerSpec:
    """Return the tokenizer of a `tokenizer.json` or SentencePiece `.model`, as a family uses it.

    Args:
      path: the file, or "clip" for CLIP's own BPE.
      family: a name of `FAMILIES`.

    Raises:
      UserError: the file has another ending, is missing or damaged.
    """
    spec, defaults = tokenizer_spec(str(path)), FAMILIES[family]
    if spec.kind == "clip":
        return spec
    if spec.kind == "sentencepiece":
        return _sentencepiece_spec(Path(path), {}, defaults, defaults.clean)
    return _huggingface_spec(Path(path), {}, defaults, defaults.clean, defaults.strip_sep)


def is_openai_bpe(folder: Path) -> bool:
    """Return whether the vocabulary and the merges in the folder are CLIP's own, entry for entry.

    Hugging Face's CLIP folders have them, with rules that leave mojibake and HTML as they are;
    the weights were trained with OpenAI's cleaning.
    """
    vocab_path, merges_path = folder / "vocab.json", folder / "merges.txt"
    json_path = folder / "tokenizer.json"
    if vocab_path.is_file() and merges_path.is_file():
        vocab: Any = _read_json(vocab_path)
        lines = read_text(merges_path).split("\n")
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
    clip_merges = read_merges()
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m or ()) for m in merges if m]
    pieces = [*vocabulary(clip_merges), START, END]
    return pairs == clip_merges and vocab == {piece: i for i, piece in enumerate(pieces)}


def write_clip_tokenizer(folder: Path, context_length: int) -> None:
    """Write `vocab.json`, `merges.txt`, `tokenizer_config.json` and `special_tokens_map.json`.

    Its ids are OpenAI's for plain text; Hugging Face does not undo mojibake or HTML, and pads with
    the end token, which a causal tower does not see.
    """
    merges = read_merges()
    pieces = [*vocabulary(merges), START, END]
    tokens = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    files = {
        "vocab.json": {piece: i for i, piece in enumerate(pieces)},
        "special_tokens_map.json": tokens,
        "tokenizer_config.json": tokens
        | {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": context_length,
            "do_lower_case": True,
            "errors": "replace",
        },
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _huggingface_spec(
    path: Path, config: Mapping[str, Any], defaults: Family, clean: str, strip_sep: bool
) -> TokenizerSpec:
    tokenizer = read_tokenizer_json(path)
    _tell_normalizing(config, _read_json(path).get("normalizer") or {}, path.parent)

    def token_id(name: str) -> int | None:
        return call_rust(lambda: tokenizer.token_to_id(name), f"{path} is damaged")

    sot_id = eot_id = None
    if defaults.start is not None:
        sot_id = _id_of(_token(config, "src_lang") or defaults.start, token_id, path)
        eot_id = _id_of(_token(config, "eos_token") or "</s>", token_id, path)
    elif "add_bos_token" in config or "add_eos_token" in config:
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
        pad_id=_pad_id(config, defaults, token_id, path),
        strip_sep=strip_sep,
    )
    make_hf_tokenizer(
        path, clean=clean, sot_id=sot_id, eot_id=eot_id, pad_id=spec.pad_id, strip_sep=strip_sep
    )
    return spec


def _sentencepiece_spec(
    path: Path, config: Mapping[str, Any], defaults: Family, clean: str
) -> TokenizerSpec:
    make_sentencepiece_tokenizer(path, clean=clean)
    pad_id = _pad_id(config, defaults, piece_ids(path), path)
    return TokenizerSpec("sentencepiece", str(path), clean=clean, pad_id=pad_id)


def _pad_id(
    config: Mapping[str, Any], defaults: Family, token_id: Callable[[str], int | None], path: Path
) -> int | None:
    """Return the id of the folder's padding, else the family's; None leaves it to the tokenizer."""
    token = _token(config, "pad_token")
    if token is not None:
        return _id_of(token, token_id, path)
    return None if defaults.pad is None else token_id(defaults.pad)


def _id_of(token: str, token_id: Callable[[str], int | None], path: Path) -> int:
    index = token_id(token)
    if index is None:
        raise UserError(f"{path} has no {token!r:.80}, which tokenizer_config.json names")
    return index


def _token(config: Mapping[str, Any], key: str) -> str | None:
    """Return a token of the config: a string, or an object with the string as its content."""
    value = config.get(key)
    if isinstance(value, Mapping):
        value = value.get("content")
    if value is None or isinstance(value, str):
        return value
    raise UserError(f"tokenizer_config.json: {key} is {value!r:.80} and no token")


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """Return a JSON object; an empty one for an optional file that is absent."""
    if optional and not path.is_file():
        return {}
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it must hold a JSON object")
    return value
