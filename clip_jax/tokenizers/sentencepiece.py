"""Train a SentencePiece tokenizer on captions, and read any `.model` (SigLIP's c4, mT5, ...)."""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece as spm

from clip_jax.errors import UserError
from clip_jax.files import atomic_write
from clip_jax.tokenizers.clean import get_cleaner, replace_surrogates
from clip_jax.tokenizers.rows import fill_rows, ids_before_end, ids_to_bytes


class SentencePieceTokenizer:
    """The `Tokenizer` of a SentencePiece model; its rows are pieces, end token, pads.

    Thread-safe, and pickles with the model inside, so that loader processes can have one.
    """

    def __init__(self, processor: spm.SentencePieceProcessor, *, pad_id: int, clean: str):
        self._processor = processor
        self._clean = get_cleaner(clean)
        self.vocab_size: int = processor.get_piece_size()
        self.eot_id: int = processor.eos_id()
        self.pad_id = pad_id

    def __call__(self, texts: Sequence[str], context_length: int = 77) -> np.ndarray:
        """Return token ids, int32 [batch, context_length]; a text too long keeps its end token."""
        texts = [texts] if isinstance(texts, str) else texts
        cleaned = [replace_surrogates(self._clean(text)) for text in texts]
        rows = [ids_to_bytes(ids) for ids in self._processor.encode(cleaned, out_type=int)]
        return fill_rows(rows, context_length, eot_id=self.eot_id, pad_id=self.pad_id)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of a row of ids, up to its end token, as the model normalized it."""
        pieces = [i for i in ids_before_end(ids, self.eot_id) if i != self.pad_id]
        return self._processor.decode(pieces)


def make_sentencepiece_tokenizer(
    model_path: str | Path, *, pad_id: int | None = None, clean: str = "none"
) -> SentencePieceTokenizer:
    """Return the tokenizer of a `.model` file; every id is the file's own.

    Args:
      model_path: a SentencePiece model of any type (unigram, BPE, char, word).
      pad_id: fills rows behind the end token. None takes the model's pad piece, and its end token
        where it has none (`pad_id` -1), as big_vision does. SigLIP was trained with the end token
        (id 1) as padding although its model has a pad piece: give it here. SigLIP 2 pads with
        Gemma's pad piece (id 0).
      clean: a name of `clean.CLEANERS`, done before the model's normalization; SigLIP's is
        "canonicalize".

    Raises:
      UserError: the file is missing, is not a model, or has no end token.
    """
    get_cleaner(clean)
    processor = _read_model(model_path)
    eos_id, model_pad_id = processor.eos_id(), processor.pad_id()
    vocab_size = processor.get_piece_size()
    if eos_id < 0:
        raise UserError(
            f"{model_path} has no end token (eos_id is {eos_id}), which a text tower needs: "
            "train the model with an eos_id"
        )
    if pad_id is None:
        pad_id = model_pad_id if model_pad_id >= 0 else eos_id
    if not 0 <= pad_id < vocab_size:
        raise UserError(f"pad_id {pad_id} is outside the {vocab_size} ids of {model_path}")
    return SentencePieceTokenizer(processor, pad_id=pad_id, clean=clean)


def piece_ids(model_path: str | Path) -> Callable[[str], int | None]:
    """Return the function from a piece to its id (None for what the model does not have).

    Raises:
      UserError: the file is missing or is not a model.
    """
    processor = _read_model(model_path)

    def id_of(piece: str) -> int | None:
        index = processor.piece_to_id(replace_surrogates(piece))
        return index if processor.id_to_piece(index) == piece else None

    return id_of


def _read_model(model_path: str | Path) -> spm.SentencePieceProcessor:
    path = Path(model_path)
    try:
        model = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read the SentencePiece model {path}: {error.strerror}; name one that is there"
            " (`python -m clip_jax.tokenizers.train` makes one)"
        ) from error
    try:
        if not model:
            raise ValueError("empty file")  # the library takes it for a model of no pieces
        processor = spm.SentencePieceProcessor(model_proto=model)
        processor.eos_id(), processor.pad_id(), processor.get_piece_size()
    except (TypeError, AttributeError, NameError):
        raise
    except Exception as error:  # the library raises RuntimeError, ValueError and others
        raise UserError(
            f"{path} ({len(model)} bytes) is not a SentencePiece model: "
            "fetch it again, or give the path of another .model file"
        ) from error
    return processor


def train_sentencepiece(
    captions: Iterable[str],
    path: str | Path,
    vocab_size: int,
    *,
    model_type: str = "unigram",
    character_coverage: float = 0.9995,
    num_threads: int = 4,
) -> Path:
    """Train a model ("unigram" or "bpe") on captions and write it to `path`.

    Ids: pad 0, end 1, unknown 2, then 256 byte pieces; no start token. Text is lower-cased and
    NFKC-normalized (`nmt_nfkc_cf`). Characters beyond `character_coverage` are spelled in bytes, so
    that nothing is unknown. Captions of more than 4,192 bytes are left out.

    The same captions in the same order give the same file: nothing is sampled or shuffled.
    `num_threads` is a fixed number because the order of floating-point sums hangs on it.

    Raises:
      UserError: `vocab_size` does not suit the captions (the message has the limit).
    """
    path = Path(path)
    model = io.BytesIO()
    texts = map(replace_surrogates, captions)
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
    # A reader never sees half a model.
    with atomic_write(path) as partial:
        partial.write_bytes(model.getvalue())
    return path
