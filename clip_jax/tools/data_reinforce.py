"""Store the teachers' features of a run: `python -m clip_jax.data.reinforce --config X --out DIR`.

They are those of the very crops and captions that the run will see, epoch by epoch. With
--config.distill.features=DIR it then trains without its teachers, to the same bits. The same
command goes on where it was stopped; --part-of 0/8 makes an eighth of the files.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from clip_jax.config import resolve
from clip_jax.errors import UserError, run_command
from clip_jax.tools.config_flags import parse as parse_config
from clip_jax.tools.embed import process_place

if TYPE_CHECKING:
    from clip_jax.training.reinforce import Reinforced


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; return its flags, and the rest of it for `config_flags`."""
    parser = argparse.ArgumentParser(
        prog="python -m clip_jax.data.reinforce",
        description=__doc__,
        allow_abbrev=False,
        epilog="--config EXPERIMENT and --config.a.b=value are as clip_jax.main takes them",
    )
    parser.add_argument("--out", required=True, help="the folder of the features")
    parser.add_argument(
        "--epochs", type=int, default=0, help="how many to store; as many as the run begins"
    )
    parser.add_argument("--part-of", metavar="I/N", help="this process and how many, from 0/N on")
    return parser.parse_known_args(argv[1:])


def result_text(result: "Reinforced") -> str:
    """Return what the command prints."""
    names = ", ".join(f"{info.name} ({info.embed_dim} features)" for info in result.infos)
    lines = [
        f"{result.folder}: {result.made} files made; {result.epochs} epochs of "
        f"{result.samples:,} samples by {names}"
    ]
    if result.missing:
        lines.append(f"{result.missing} files of other processes are missing still")
    if result.skipped:
        causes = ", ".join(f"{n:,} {cause}" for cause, n in result.skipped.most_common())
        lines.append(f"could not be used: {causes} (skipped.jsonl)")
    return "\n".join(lines)


def main() -> int:
    """Parse the flags, store the features and print what was made; return the exit code.

    Raises:
      UserError: a number is out of range.
    """
    args, rest = parse(sys.argv)
    if args.epochs < 0:
        raise UserError(f"--epochs is {args.epochs}; it takes 0 or more")
    config = resolve(parse_config([sys.argv[0], *rest]))
    process_index, process_count = process_place(args.part_of)
    from clip_jax.training.reinforce import reinforce

    result = reinforce(
        config,
        args.out,
        epochs=args.epochs,
        process_index=process_index,
        process_count=process_count,
    )
    print(result_text(result))
    return 0


if __name__ == "__main__":
    run_command(main)
