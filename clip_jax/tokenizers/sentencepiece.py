"""SentencePiece tokenizers: train one on captions, read any `.model` (SigLIP's c4, mT5, ...)."""

import io
import os
import string
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece as spm

from clip_jax.errors import UserError
from clip_jax.tokenizers.rows import fill_rows


def canonicalize(text: str) -> str:
    """SigLIP's cleaning: lower case, "_" to a space, ASCII punctuation out, spaces collapsed."""
    text = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation))
    return " ".join(text.lower().split())


# What happens to a text before the model's own normalisation; the weights decide which one.
CLEANERS: dict[str, Callable[[str], str]] = {
    "none": str,
    "lower": str.lower,
    "canonicalize": canonicalize,
}


class SentencePieceTokenizer:
    """The `Tokenizer` of a SentencePiece model; rows are pieces, end token, pads. No start token.

    Thread-safe, and pickles with the model inside, so that loader processes can have one.
    """

    def __init__(self, processor: spm.SentencePieceProcessor, *, pad_id: int, clean: str):
        self._processor = processor
        self._clean = CLEANERS[clean]
        self.vocab_size: int = processor.get_piece_size()
        self.eot_id: int = processor.eos_id()
        self.pad_id = pad_id

    def __call__(self, texts: Sequence[str], context_length: int = 77) -> np.ndarray:
        """Token ids, int32 [batch, context_length]; a text too long keeps its end token."""
        texts = [texts] if isinstance(texts, str) else texts
        # A lone surrogate has no UTF-8 form, and the library would raise on it.
        cleaned = [self._clean(t).encode("utf-8", "replace").decode("utf-8") for t in texts]
        rows = self._processor.encode(cleaned, out_type=int)
        return fill_rows(rows, context_length, eot_id=self.eot_id, pad_id=self.pad_id)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of one row of ids, up to its end token, as the model normalised it."""
        ids = [int(i) for i in ids]
        ids = ids[: ids.index(self.eot_id)] if self.eot_id in ids else ids
        return self._processor.decode([i for i in ids if i != self.pad_id])


def make_sentencepiece_tokenizer(
    model_path: str | Path, *, pad_id: int | None = None, clean: str = "none"
) -> SentencePieceTokenizer:
    """The tokenizer of a `.model` file; every id is the file's own.

    Args:
      model_path: a SentencePiece model of any type (unigram, BPE, char, word).
      pad_id: fills rows behind the end token. None takes the model's pad piece, and its end token
        where it has none (`pad_id` -1), as big_vision does. SigLIP was trained with the end token
        as padding although its model has a pad piece: give it here.
      clean: "none", "lower" or "canonicalize" (SigLIP), done before the model's normalisation.

    Raises UserError when the file is missing, is not a model, or has no end token.
    """
    path = Path(model_path)
    if clean not in CLEANERS:
        raise UserError(f"clean={clean!r} is unknown: use one of {', '.join(CLEANERS)}")
    try:
        model = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the SentencePiece model {path}: {error.strerror}") from error
    try:
        if not model:
            raise ValueError("empty file")  # the library takes it for a model of no pieces
        processor = spm.SentencePieceProcessor(model_proto=model)
        eos_id, model_pad_id = processor.eos_id(), processor.pad_id()
        vocab_size = processor.get_piece_size()
    except Exception as error:  # the library raises RuntimeError, ValueError and others
        raise UserError(
            f"{path} ({len(model)} bytes) is not a SentencePiece model: "
            "fetch it again, or give the path of another .model file"
        ) from error
    if eos_id < 0:
        raise UserError(
            f"{path} has no end token (eos_id is {eos_id}), which a text tower needs: "
            "train the model with an eos_id"
        )
    if pad_id is None:
        pad_id = model_pad_id if model_pad_id >= 0 else eos_id
    if not 0 <= pad_id < vocab_size:
        raise UserError(f"pad_id {pad_id} is outside the {vocab_size} ids of {path}")
    return SentencePieceTokenizer(processor, pad_id=pad_id, clean=clean)


def train_sentencepiece(
    captions: Iterable[str],
    path: str | Path,
    vocab_size: int,
    *,
    model_type: str = "unigram",
    character_coverage: float = 0.9995,
    num_threads: int = 4,
) -> Path:
    """Trains a model ("unigram" or "bpe") on captions and writes it to `path`.

    Ids: pad 0, end 1, unknown 2, then 256 byte pieces; no start token. Text is lower-cased and
    NFKC-normalised (`nmt_nfkc_cf`). Characters beyond `character_coverage` are spelt in bytes, so
    that nothing is unknown. Captions of more than 4,192 bytes are left out.

    The same captions in the same order give the same file: nothing is sampled or shuffled.
    `num_threads` is a fixed number because the order of floating-point sums hangs on it.

    Raises UserError when `vocab_size` does not suit the captions (the message has the limit).
    """
    path = Path(path)
    model = io.BytesIO()
    texts = (text.encode("utf-8", "replace").decode("utf-8") for text in captions)
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=texts,
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="nmt_nfkc_cf",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            shuffle_input_sentence=False,
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        # "INTERNAL: src/trainer.cc(12) [condition] Vocabulary size too high (9). Please ..."
        reason = str(error).rpartition("]")[2].strip() or "the captions hold no text"
        raise UserError(
            f"cannot train a SentencePiece model of vocab_size {vocab_size}: {reason}"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(model.getvalue())
    # A reader never sees half a model.
    os.replace(partial, path)
    return path
