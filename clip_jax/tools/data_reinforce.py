"""Store the teachers' features of a run: `python -m clip_jax.data.reinforce --config X --out DIR`.

They are those of the very crops and captions that the run will see, epoch by epoch. With
--config.distill.features=DIR it then trains without its teachers, to the same bits. The same
command goes on where it was stopped; --part-of 0/8 makes an eighth of the files.
"""

import argparse
import dataclasses
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_jax.config import resolve
from clip_jax.data.manifest import RUN_MANIFEST_FILENAME
from clip_jax.errors import UserError, run_command
from clip_jax.executors.parts import Executor, PartMaker
from clip_jax.executors.pool import WorkerPool
from clip_jax.files import absolute_model, atomic_write, check_local
from clip_jax.sections import Config, config_from_saved, replace_values
from clip_jax.tools.absolute_paths import absolute_source
from clip_jax.tools.config_flags import parse as parse_config
from clip_jax.tools.embed import process_place
from clip_jax.tools.executor_flags import add_executor_flags, executor_of, pop_executor_flags

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
    add_executor_flags(parser)
    return parser.parse_known_args(argv[1:])


def result_text(result: "Reinforced") -> str:
    """Return what the command prints."""
    folder = result.folder
    names = ", ".join(f"{info.name} ({info.embed_dim} features)" for info in folder.infos)
    lines = [
        f"{folder.path}: {result.made} files made; {result.epochs} epochs of "
        f"{folder.samples:,} samples by {names}"
    ]
    if result.missing:
        lines.append(f"{result.missing} files of other processes are missing still")
    if result.skipped:
        causes = ", ".join(f"{n:,} {cause}" for cause, n in result.skipped.most_common())
        lines.append(f"could not be used: {causes}")
    return "\n".join(lines)


def absolute_config(config: Config) -> Config:
    """Return a config whose paths are good in any current folder."""
    data, train = config.data, config.data.train
    sources = (
        absolute_source(train) if isinstance(train, str) else tuple(map(absolute_source, train))
    )
    values = {
        "data.train": sources,
        "data.tokenizer": absolute_model(data.tokenizer),
        "model.init_from": absolute_model(config.model.init_from),
        "distill.teachers": tuple(map(absolute_model, config.distill.teachers)),
    }
    return replace_values(config, values)


def reinforce_on(executor: Executor, config: Config, out: Path, epochs: int) -> "Reinforced":
    """Make the files that are not there yet on the workers of an executor.

    Raises:
      UserError: as `training.reinforce.reinforce`, or the workers do not see the same files.
    """
    from clip_jax.training.reinforce import Reinforced, file_sizes
    from clip_jax.training.stored_features import begin_features

    out = Path(os.path.abspath(out))
    options = {"config": dataclasses.asdict(absolute_config(config)), "out": str(out)}
    skipped: Counter[str] = Counter()
    with WorkerPool(
        executor, "clip_jax.tools.data_reinforce:open_reinforcer", options, uses_devices=True
    ) as pool:
        info, run_epochs = pool.info()
        begin_features(out, info)
        folder, epochs = info.folder(out), epochs or run_epochs
        missing = folder.missing(epochs)
        pool.run(
            file_sizes(folder, epochs),
            missing,
            title="reinforce",
            unit=" samples",
            on_part=lambda part, found: skipped.update(found),
        )
    return Reinforced(folder, epochs, len(missing), skipped)


def open_reinforcer(config: dict[str, Any], out: str) -> PartMaker:
    """Open what a worker stores features with, by the command line's options."""
    from clip_jax.training.reinforce import open_reinforcement
    from clip_jax.training.stored_features import begin_features

    folder = Path(out)
    counts = folder / RUN_MANIFEST_FILENAME
    with tempfile.TemporaryDirectory(prefix="clip_jax_reinforce_") as scratch:
        counted = Path(scratch) / RUN_MANIFEST_FILENAME
        if counts.is_file():
            shutil.copyfile(counts, counted)
        opened = open_reinforcement(config_from_saved(config), scratch)
        # None where the data has an index of its own.
        index = counted.read_bytes() if counted.is_file() else None

    def make(place: tuple[int, int]) -> Counter[str]:
        if index is not None and not counts.exists():
            with atomic_write(counts, shared=True) as partial:  # the next worker need not count
                partial.write_bytes(index)
        return opened.make(opened.info.folder(folder), [place])

    return PartMaker(
        (opened.info, opened.epochs()),
        make=make,
        folder=folder,
        is_begun=lambda: begin_features(folder, opened.info, write=False),
    )


def main() -> int:
    """Parse the flags, store the features and print what was made; return the exit code.

    Raises:
      UserError: a number is out of range, or flags contradict.
    """
    args, rest = parse(sys.argv)
    check_local({"--out": args.out})
    if args.epochs < 0:
        raise UserError(f"--epochs is {args.epochs}; it takes 0 or more")
    flags = pop_executor_flags(args)
    if flags.executor and args.part_of:
        raise UserError("--part-of shares parts out by hand, and --executor does: give one of them")
    config = resolve(parse_config([sys.argv[0], *rest]))
    with executor_of(flags) as executor:
        if executor is not None:
            print(result_text(reinforce_on(executor, config, Path(args.out), args.epochs)))
            return 0
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
