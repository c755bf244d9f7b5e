"""Convert a checkpoint: `python -m clip_jax.convert SRC DST --to {own,open_clip,hf}`.

SRC is anything that `clip_jax.load` reads: a run, a published file or folder. DST is a new folder.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from clip_jax.errors import run_command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.convert", description=__doc__)
    parser.add_argument("src", help="a run's work folder, or a published file or folder")
    parser.add_argument("dst", help="the folder to write, which must not hold anything")
    parser.add_argument(
        "--to",
        default="own",
        choices=("own", "open_clip", "hf"),
        help="own: a work folder of this project with one safetensors file",
    )
    parser.add_argument("--model", help='the model of a bare file: "NAME" or "NAME:TAG"')
    parser.add_argument("--tokenizer", help="its tokenizer.json or SentencePiece .model")
    parser.add_argument("--image-size", type=int, help="interpolate to images of this size")
    parser.add_argument("--context-length", type=int, help="shorten to texts of this length")
    return parser.parse_args(argv)


def convert(
    src: str,
    dst: str,
    *,
    to: str = "own",
    model: str | None = None,
    tokenizer: str | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
) -> str:
    """Read a checkpoint and write it in another format; returns what to tell the user.

    Raises:
      UserError: the checkpoint cannot be read, the format has no such model, or DST holds
        something.
    """
    from clip_jax import api
    from clip_jax.pretrained.export import WRITERS, new_folder
    from clip_jax.pretrained.trees import from_variables
    from clip_jax.pretrained.work_folder import RunDescription

    # Claimed first: a wrong name answers before a big model is read.
    with new_folder(Path(dst)) as part:
        clip = api.load(
            src,
            model,
            tokenizer=tokenizer,
            image_size=image_size,
            context_length=context_length,
        )
        about = RunDescription(clip.name, clip.config, clip.tokenizer_spec, clip.preprocessing)
        arrays = from_variables(clip.params, clip.batch_stats)
        WRITERS[to](part, about, arrays)
    count = sum(x.size for x in arrays.values())
    return f"{dst}: {clip.name}, {count:,} numbers in the format {to}"


def main() -> int:
    """Parse and convert; the exit code."""
    args = parse(None)
    print(
        convert(
            args.src,
            args.dst,
            to=args.to,
            model=args.model,
            tokenizer=args.tokenizer,
            image_size=args.image_size,
            context_length=args.context_length,
        )
    )
    return 0


if __name__ == "__main__":
    run_command(main)
