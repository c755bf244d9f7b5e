"""Train a tokenizer: `python -m clip_jax.tokenizers.train --captions FILE --out X.model`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from clip_jax.errors import UserError, run_command
from clip_jax.tokenizers.sentencepiece import train_sentencepiece


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m clip_jax.tokenizers.train", description=__doc__
    )
    parser.add_argument("--captions", required=True, help="text file with one caption a line")
    parser.add_argument("--out", required=True, help="the .model file to write")
    parser.add_argument("--model-type", default="unigram", choices=("unigram", "bpe"))
    parser.add_argument("--vocab-size", type=int, default=32_000, help="ids, the special ones too")
    return parser.parse_args(argv)


def train(captions_file: str, out: str, vocab_size: int, model_type: str = "unigram") -> str:
    """Train on a file of captions; returns what to tell the user.

    Raises:
      UserError: the file cannot be read, or is too small for the vocabulary.
    """
    if Path(out).exists():
        return f"{out} is already there: nothing to do"
    try:
        captions = Path(captions_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise UserError(f"captions {captions_file} cannot be read: {error}") from None
    train_sentencepiece(captions, out, vocab_size, model_type=model_type)
    return f"{out}: {vocab_size:,} ids from {len(captions):,} captions"


def main() -> int:
    """Parse and train; the exit code."""
    args = parse(None)
    print(train(args.captions, args.out, args.vocab_size, args.model_type))
    return 0


if __name__ == "__main__":
    run_command(main)
