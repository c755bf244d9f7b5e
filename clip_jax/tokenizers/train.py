"""Train a tokenizer: `python -m clip_jax.tokenizers.train --captions FILE --out X.model`."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clip_jax.errors import UserError, run_command
from clip_jax.files import check_local
from clip_jax.tokenizers.sentencepiece import train_sentencepiece


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m clip_jax.tokenizers.train", description=__doc__
    )
    add = parser.add_argument
    add("--captions", required=True, help="text file with one caption a line")
    add("--out", required=True, help="the .model file to write")
    add("--model-type", default="unigram", choices=("unigram", "bpe"))
    add("--vocab-size", type=int, default=32_000, help="ids, the special ones too")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class TrainedTokenizer:
    """A `.model` file that was written, its ids, and the captions it was trained on.

    Both numbers are None where the file was there already and was left as it is.
    """

    path: str
    vocab_size: int | None
    captions: int | None


def train(
    captions: str, out: str, vocab_size: int, model_type: str = "unigram"
) -> TrainedTokenizer:
    """Train on a file of captions; leave a model that is already there as it is.

    Args:
      captions: a text file with one caption a line.
      out: the `.model` file to write.
      vocab_size: ids, the special ones too.
      model_type: "unigram" or "bpe".

    Raises:
      UserError: the file cannot be read, or is too small for the vocabulary.
    """
    check_local({"--out": out})
    if Path(out).exists():
        return TrainedTokenizer(out, None, None)
    try:
        # A line feed alone ends a caption, as in the data.
        lines = Path(captions).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeError) as error:
        raise UserError(f"captions {captions} cannot be read: {error}") from None
    train_sentencepiece(lines, out, vocab_size, model_type=model_type)
    return TrainedTokenizer(out, vocab_size, len(lines))


def trained_text(tokenizer: TrainedTokenizer) -> str:
    """Return the line that the command prints."""
    if tokenizer.captions is None:
        return f"{tokenizer.path} is already there: nothing to do"
    return f"{tokenizer.path}: {tokenizer.vocab_size:,} ids from {tokenizer.captions:,} captions"


def main() -> int:
    """Parse the flags, train and print the result; return the exit code."""
    print(trained_text(train(**vars(parse(None)))))
    return 0


if __name__ == "__main__":
    run_command(main)
