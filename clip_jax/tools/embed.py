"""Embed images: `python -m clip_jax.embed --model MODEL --data SOURCE --out DIR`.

DIR gets clip-retrieval's layout: `img_emb/`, `text_emb/` and `metadata/`, float16 of unit length.
The same command goes on where it was stopped. On a cluster start it once on every machine: each
process makes parts of its own, none waits for another; or once in all, with `--executor ray`.
"""

import argparse
import dataclasses
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_jax.errors import UserError, run_command
from clip_jax.executors.parts import Executor, PartMaker
from clip_jax.executors.pool import WorkerPool
from clip_jax.files import absolute_model, check_local
from clip_jax.parallel.cluster import detected_place
from clip_jax.tools.absolute_paths import absolute_checkpoint, absolute_source
from clip_jax.tools.executor_flags import add_executor_flags, executor_of, pop_executor_flags

if TYPE_CHECKING:
    from clip_jax.data.shards import Shard
    from clip_jax.embeddings.folder import EmbeddingInfo
    from clip_jax.evaluation.encoders import Encoders


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.embed", description=__doc__)
    parser.add_argument("--model", required=True, help="a run, or a published model's path or name")
    parser.add_argument("--architecture", default="", help='of a bare file: "NAME" or "NAME:TAG"')
    parser.add_argument("--tokenizer", default="", help="its tokenizer.json or .model")
    parser.add_argument("--dtype", default="float32", help="float32, or bfloat16: half the memory")
    parser.add_argument("--data", required=True, help="images, as docs/data.md names sources")
    parser.add_argument("--out", required=True, help="the folder")
    parser.add_argument("--batch-size", type=int, default=256, help="images at a time")
    parser.add_argument("--part-size", type=int, default=32_768, help="samples of a part's files")
    parser.add_argument("--part-of", metavar="I/N", help="this process and how many, from 0/N on")
    parser.add_argument("--no-text", action="store_true", help="captions are not embedded")
    add_executor_flags(parser)
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class EmbedResult:
    """The outcome of one call of the command.

    Attributes:
      folder: the embeddings.
      info: their source and settings.
      parts: the numbers of the parts that this process made.
      skipped: how many samples could not be used, by cause; None while parts are missing.
    """

    folder: Path
    info: "EmbeddingInfo"
    parts: list[int]
    skipped: Counter[str] | None

    @property
    def rows(self) -> int | None:
        """The images of the finished folder; None while parts are missing."""
        return None if self.skipped is None else self.info.samples - self.skipped.total()


def process_place(part_of: str | None) -> tuple[int, int]:
    """Return (this process, processes), by the flag or else by the cluster's environment.

    Raises:
      UserError: the flag is no I/N.
    """
    if part_of is None:
        return detected_place()
    match = re.fullmatch(r"(\d+)/(\d+)", part_of)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"--part-of {part_of!r} is not I/N with I from 0 to N - 1, such as 0/8")
    return int(match[1]), int(match[2])


def embed_source(args: argparse.Namespace) -> EmbedResult:
    """Embed what the command line says.

    Raises:
      UserError: the model or the data cannot be read, or the folder holds something else.
    """
    from clip_jax.embeddings.folder import begin_folder
    from clip_jax.embeddings.write import embed, finish_folder

    flags = pop_executor_flags(args)
    check_local({"--out": args.out})
    if min(args.batch_size, args.part_size) < 1:
        raise UserError("--batch-size and --part-size must be at least 1")
    if flags.executor and args.part_of:
        raise UserError("--part-of shares parts out by hand, and --executor does: give one of them")
    with executor_of(flags) as executor:
        if executor is not None:
            return embed_on(executor, args)
    process_index, process_count = process_place(args.part_of)
    encoders, shards, info = _open(args)
    folder = Path(args.out)
    begin_folder(folder, info)
    parts = embed(
        encoders, shards, info, folder, process_index=process_index, process_count=process_count
    )
    return EmbedResult(folder, info, parts, finish_folder(folder, info))


def _open(args: argparse.Namespace) -> "tuple[Encoders, list[Shard], EmbeddingInfo]":
    """Open the model and the data of a command line.

    Raises:
      UserError: they cannot be read, or this process's devices are part of a larger system.
    """
    import jax

    from clip_jax.api import load_encoders
    from clip_jax.data.sources import fingerprint
    from clip_jax.embeddings.write import open_images

    shards = open_images(args.data)
    if not (samples := sum(map(len, shards))):
        raise UserError(f"--data {args.data} holds no image")
    encoders = load_encoders(
        args.model,
        architecture=args.architecture or None,
        tokenizer=args.tokenizer or None,
        dtype=args.dtype,
    )
    if jax.process_count() > 1:
        raise UserError(
            "the devices of this machine have started together with those of others, as on a TPU "
            "pod, and embed works with a machine's own; start it on a single one"
        )
    return encoders, shards, embedding_info(args, encoders, fingerprint(shards), samples)


def embed_on(executor: Executor, args: argparse.Namespace) -> EmbedResult:
    """Embed what the command line says on the workers of an executor.

    Raises:
      UserError: as `embed_source`, or the workers do not see the same files.
    """
    from clip_jax.embeddings.folder import begin_folder
    from clip_jax.embeddings.write import finish_folder, missing_parts, part_sizes

    folder = Path(os.path.abspath(args.out))
    options = absolute_checkpoint(vars(args)) | {
        "data": absolute_source(args.data),
        "out": str(folder),
    }
    with WorkerPool(
        executor, "clip_jax.tools.embed:open_embedder", options, uses_devices=True
    ) as pool:
        info = pool.info()
        begin_folder(folder, info)
        parts = missing_parts(folder, info, range(info.parts))
        pool.run(part_sizes(info, range(info.parts)), parts, title="embed", unit=" images")
    return EmbedResult(Path(args.out), info, parts, finish_folder(folder, info))


def open_embedder(**options: Any) -> PartMaker:
    """Open what a worker embeds with, by the command line's options."""
    from clip_jax.embeddings.folder import begin_folder
    from clip_jax.embeddings.write import embed_part

    args = argparse.Namespace(**options)
    encoders, shards, info = _open(args)
    folder = Path(args.out)

    return PartMaker(
        info,
        make=lambda number: embed_part(encoders, shards, info, folder, number),
        folder=folder,
        is_begun=lambda: begin_folder(folder, info, write=False),
    )


def embedding_info(
    args: argparse.Namespace, encoders: "Encoders", fingerprint: str, samples: int
) -> "EmbeddingInfo":
    """Return what the folder's `embedding.json` will hold."""
    from clip_jax.embeddings.folder import EmbeddingInfo

    return EmbeddingInfo(
        model=absolute_model(args.model),
        architecture=args.architecture,
        tokenizer=absolute_source(args.tokenizer) if args.tokenizer else "",
        name=encoders.name,
        identity=encoders.identity,
        embed_dim=encoders.embed_dim,
        data=absolute_source(args.data),
        fingerprint=fingerprint,
        samples=samples,
        part_rows=max(1, args.part_size // args.batch_size) * args.batch_size,
        batch_size=args.batch_size,
        texts=not args.no_text,
        dtype=args.dtype,
    )


def result_text(result: EmbedResult) -> str:
    """Return the line that the command prints."""
    from clip_jax.embeddings.write import SKIPPED_FILENAME

    line = f"{result.folder}: {len(result.parts)} of {result.info.parts} parts made"
    if result.skipped is None:
        return f"{line}; parts of other processes are missing still"
    line += f"; {result.rows:,} images of {result.info.embed_dim} features"
    causes = ", ".join(f"{n:,} {cause}" for cause, n in result.skipped.most_common())
    if causes:
        line += f"; could not be used: {causes} ({result.folder / SKIPPED_FILENAME})"
    return line


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, embed, and print what was made; return the exit code.

    Raises:
      UserError: not one image could be used.
    """
    result = embed_source(parse(argv))
    if result.rows == 0:
        raise UserError(f"{result.info.data}: no image is embedded. {result_text(result)}")
    print(result_text(result))
    return 0


if __name__ == "__main__":
    run_command(main)
