"""Convert a checkpoint: `python -m clip_jax.convert SRC DST --to {own,open_clip,hf}`.

SRC is anything that `clip_jax.load` reads: a run, a published file or folder. DST is a new folder.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clip_jax.errors import run_command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.convert", description=__doc__)
    add = parser.add_argument
    add("src", help="a run's work folder, or a published file or folder")
    add("dst", help="the folder to write, which must not hold anything")
    add(
        "--to",
        default="own",
        choices=("own", "open_clip", "hf"),
        help="own: a work folder of this project with one safetensors file",
    )
    add("--architecture", "--model", help='of a bare file: "NAME" or "NAME:TAG"')
    add("--tokenizer", help="its tokenizer.json or SentencePiece .model")
    add("--image-size", type=int, help="interpolate to images of this size, pixels")
    add("--context-length", type=int, help="shorten to texts of this length, tokens")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class ConvertedModel:
    """A model that was written: its folder, its name, the format, and how many numbers it has."""

    folder: Path
    name: str
    format: str
    num_values: int


def convert(
    src: str,
    dst: str,
    *,
    to: str = "own",
    architecture: str | None = None,
    tokenizer: str | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
) -> ConvertedModel:
    """Read a checkpoint and write it in another format.

    Args:
      src: what `clip_jax.load` reads.
      dst: the folder to write, which must not hold anything.
      to: "own", "open_clip" or "hf".
      architecture: the model of a bare file, "NAME" or "NAME:TAG".
      tokenizer: its file, where the checkpoint came without one.
      image_size, context_length: sizes to interpolate to, in pixels and tokens.

    Raises:
      UserError: the checkpoint cannot be read, the format has no such model, or the folder holds
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
            architecture,
            tokenizer=tokenizer,
            image_size=image_size,
            context_length=context_length,
        )
        description = RunDescription(
            clip.name, clip.config, clip.tokenizer_spec, clip.preprocessing
        )
        arrays = from_variables(clip.params, clip.batch_stats)
        WRITERS[to](part, description, arrays)
    return ConvertedModel(Path(dst), clip.name, to, sum(x.size for x in arrays.values()))


def converted_text(model: ConvertedModel) -> str:
    """Return the line that the command prints."""
    return (
        f"{model.folder}: {model.name}, {model.num_values:,} numbers in the format {model.format}"
    )


def main() -> int:
    """Parse the flags, convert and print the result; return the exit code."""
    print(converted_text(convert(**vars(parse(None)))))
    return 0


if __name__ == "__main__":
    run_command(main)
