"""Turn text into token ids: CLIP's byte-pair encoding, SentencePiece, Hugging Face's files."""

from clip_jax.tokenizers.clip_bpe import make_clip_tokenizer
from clip_jax.tokenizers.folder import tokenizer_from_file, tokenizer_from_folder
from clip_jax.tokenizers.huggingface import make_hf_tokenizer
from clip_jax.tokenizers.sentencepiece import make_sentencepiece_tokenizer, train_sentencepiece
from clip_jax.tokenizers.spec import (
    TokenizerSpec,
    make_tokenizer,
    spec_digest,
    spec_from_json,
    spec_to_json,
    tokenizer_spec,
)

__all__ = [
    "TokenizerSpec",
    "make_clip_tokenizer",
    "make_hf_tokenizer",
    "make_sentencepiece_tokenizer",
    "make_tokenizer",
    "spec_digest",
    "spec_from_json",
    "spec_to_json",
    "tokenizer_from_file",
    "tokenizer_from_folder",
    "tokenizer_spec",
    "train_sentencepiece",
]
