"""Text to token ids: CLIP's byte-pair encoding, or any SentencePiece model."""

from pathlib import Path

from clip_jax.errors import UserError
from clip_jax.tokenizers.clip_bpe import make_clip_tokenizer
from clip_jax.tokenizers.sentencepiece import make_sentencepiece_tokenizer, train_sentencepiece
from clip_jax.typing import Tokenizer

__all__ = [
    "make_clip_tokenizer",
    "make_sentencepiece_tokenizer",
    "make_tokenizer",
    "train_sentencepiece",
]


def make_tokenizer(name_or_path: str) -> Tokenizer:
    """The tokenizer of a config: "clip", or the path of a SentencePiece `.model`.

    Raises UserError for any other name, and for a `.model` that is missing or damaged.
    """
    if name_or_path == "clip":
        return make_clip_tokenizer()
    if Path(name_or_path).suffix == ".model":
        return make_sentencepiece_tokenizer(name_or_path)
    raise UserError(
        f'unknown tokenizer {name_or_path!r}: use "clip" or the path of a SentencePiece .model file'
    )
