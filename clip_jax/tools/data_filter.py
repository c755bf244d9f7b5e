"""Keep the pairs that a model finds fitting: `python -m clip_jax.data.filter SOURCE --model M --out
DIR --threshold 0.28` (or `--top 0.3`).

Scores are the cosines of each image and its caption. DIR/scores keeps them, part by part, and the
same command goes on after a kill. The kept pairs become tar shards, `similarity` among their
fields; with neither flag all scored ones do, for `config.data.filter="similarity>=0.28"`.
"""

import argparse
import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_jax.data.dataset import open_line
from clip_jax.data.shards import Shard
from clip_jax.data.skip_log import SkipLog
from clip_jax.data.sources import fingerprint
from clip_jax.data.writing.scores import FIELD, part_path, read_scores, select, write_part
from clip_jax.data.writing.shard_set import ShardSet, claim_shard_folder, write_set
from clip_jax.errors import UserError, run_command
from clip_jax.files import claim_folder
from clip_jax.progress_bar import progress_bar
from clip_jax.tools.data_shard import told

if TYPE_CHECKING:
    from clip_jax.evaluation.encoders import Encoders

SCORES, BUILD_INFO = "scores", "scores.json"
PART_ROWS = 8192
"""Samples of a part of the scores, about."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.data.filter", description=__doc__)
    parser.add_argument("source", nargs="+", help="tar shards, a table, records, a folder, a URL")
    parser.add_argument("--model", required=True, help="a run, or a published model")
    parser.add_argument("--architecture", help='of a bare file: "NAME" or "NAME:TAG"')
    parser.add_argument("--tokenizer", help="its tokenizer.json or SentencePiece .model")
    parser.add_argument("--out", required=True, help="the folder for scores and shards")
    parser.add_argument("--threshold", type=float, help="least cosine that is kept")
    parser.add_argument("--top", type=float, help="share that is kept, the best ones: 0.3")
    parser.add_argument("--scores-only", action="store_true", help="write no shards")
    parser.add_argument("--filter", default="", help='as config.data.filter: "width>=200"')
    parser.add_argument("--batch-size", type=int, default=256, help="pairs scored at a time")
    parser.add_argument("--per-shard", type=int, default=10_000, help="samples of a shard")
    parser.add_argument("--threads", type=int, default=4, help="that read and decode")
    return parser.parse_args(argv)


def load_encoders(
    model: str, architecture: str | None = None, tokenizer: str | None = None
) -> "Encoders":
    """A checkpoint's encoders over all devices."""
    from clip_jax.api import encoders_of, load_over_devices

    return encoders_of(*load_over_devices(model, architecture=architecture, tokenizer=tokenizer))


def score_set(
    encoders: "Encoders",
    indexes: Sequence[Shard],
    folder: Path,
    *,
    batch_size: int = 256,
    threads: int = 4,
) -> tuple[np.ndarray, Counter[str]]:
    """The score of every sample, float32 in the order of the data, and what was skipped.

    Parts that are in the folder are not made again. In memory are a part and 4 bytes a sample.

    Raises:
      UserError: the folder is another model's or other data's, or features are not finite.
    """
    from clip_jax.evaluation.run import whole_batch
    from clip_jax.evaluation.similarity import similarities

    batch_size = whole_batch(encoders, batch_size)
    per_part = max(1, PART_ROWS // batch_size)
    build_info = {
        "model": encoders.identity,
        "data": fingerprint(indexes),
        "--batch-size": batch_size,
        "batches of a part": per_part,
        "preprocessing": repr((encoders.image_size, encoders.preprocess)),
    }
    claim_folder(folder, build_info, name=BUILD_INFO)
    total = sum(len(index) for index in indexes)
    parts = math.ceil(total / (per_part * batch_size))
    done = next((n for n in range(parts) if not part_path(folder, n).exists()), parts)
    with contextlib.ExitStack() as stack:
        start = done * per_part * batch_size
        progress = stack.enter_context(progress_bar(total, "score", initial=min(start, total)))
        loader = stack.enter_context(
            encoders.loader(
                indexes, batch_size=batch_size, steps=slice(done * per_part, None), threads=threads
            )
        )
        for number in range(done, parts):
            before, keys, scores = Counter(loader.skipped), [], []
            for batch in itertools.islice(loader, per_part):
                # The last batch is filled up with rows that are no samples.
                real = [key for key in batch["key"] if key]
                keys += real
                scores.append(similarities(encoders, batch, batch_size)[: len(real)])
                progress.update(len(real))
            skipped = Counter(loader.skipped) - before
            write_part(part_path(folder, number), keys, np.concatenate(scores), skipped)
    return read_scores(folder, parts)


def filter_set(
    source: Sequence[str],
    out: str,
    encoders: "Encoders",
    *,
    threshold: float | None = None,
    top: float | None = None,
    scores_only: bool = False,
    where: str = "",
    batch_size: int = 256,
    per_shard: int = 10_000,
    threads: int = 4,
) -> str:
    """Score a source, choose, and write what is kept; returns what to tell the user.

    Raises:
      UserError: the source holds nothing, `out` something else, or nothing is kept.
    """
    log = SkipLog()
    indexes = open_line(source, where=where, log=log)
    scores_B, skipped = score_set(
        encoders, indexes, Path(out) / SCORES, batch_size=batch_size, threads=threads
    )
    lines = [scores_text(scores_B, skipped, Path(out) / SCORES)]
    lines += [f"left out: {name}: {cause}" for cause, name, _ in log.lost]
    if not scores_only:
        rows = select(scores_B, threshold=threshold, top=top)
        shards = ShardSet(
            indexes,
            rows,
            Path(out) / selection_name(threshold, top),
            per_shard,
            # Exactly the score, so that a filter on the field finds what a threshold finds.
            extra=lambda place: {FIELD: float(scores_B[rows[place]])},
        )
        claim_shard_folder(shards, {"model": encoders.identity, "--per-shard": per_shard})
        with progress_bar(len(rows), "write") as progress:
            written = write_set(shards, threads=threads, progress=progress.update)
        lines.append(f"kept {len(rows) / len(scores_B):.1%}: {told(shards, written)}")
    return "\n".join(lines)


def selection_name(threshold: float | None, top: float | None) -> str:
    """The folder of a selection; several may lie beside one set of scores."""
    parts = [f"{FIELD}-{threshold:g}"] if threshold is not None else []
    parts += [f"top-{top:g}"] if top is not None else []
    return "-".join(parts) or "all"


def scores_text(scores_B: np.ndarray, skipped: Counter[str], folder: Path) -> str:
    """How the scores are spread, and why some samples have none."""
    good = scores_B[~np.isnan(scores_B)]
    lines = [f"{len(good):,} of {len(scores_B):,} pairs scored: {folder}/part-*.parquet"]
    if len(good):
        shares = (0.05, 0.25, 0.5, 0.75, 0.95)
        spread = ", ".join(
            f"{share:.0%} below {value:.4f}"
            for share, value in zip(shares, np.quantile(good, shares), strict=True)
        )
        lines.append(f"similarity {good.min():.4f} to {good.max():.4f}: {spread}")
    if skipped:
        causes = ", ".join(f"{n:,} {cause}" for cause, n in sorted(skipped.items()))
        lines.append(f"not scored: {causes}")
    return "\n".join(lines)


def check(args: argparse.Namespace) -> None:
    """Raises UserError for a number out of range, before a model is loaded."""
    for flag, value in (
        ("--batch-size", args.batch_size),
        ("--per-shard", args.per_shard),
        ("--threads", args.threads),
    ):
        if value < 1:
            raise UserError(f"{flag} is {value}; it takes 1 or more")
    if args.threshold is not None and not -1 <= args.threshold <= 1:
        raise UserError(f"--threshold is {args.threshold:g}; a cosine lies between -1 and 1")
    if args.top is not None and not 0 < args.top <= 1:
        raise UserError(f"--top is {args.top:g}; it takes 0 < share <= 1, 0.3 say")


def main() -> int:
    """Parse, score and write; the exit code."""
    args = parse(None)
    check(args)
    print(
        filter_set(
            args.source,
            args.out,
            load_encoders(args.model, args.architecture, args.tokenizer),
            threshold=args.threshold,
            top=args.top,
            scores_only=args.scores_only,
            where=args.filter,
            batch_size=args.batch_size,
            per_shard=args.per_shard,
            threads=args.threads,
        )
    )
    return 0


if __name__ == "__main__":
    run_command(main)
