"""Select pairs by a model's scores: `python -m clip_jax.data.filter SOURCE --model M --out DIR
--threshold 0.28` (or `--top 0.3`).

A score is the cosine of an image and its caption. DIR/scores stores them, part by part, and the
same command goes on after a kill. The selected pairs become tar shards, `similarity` among their
fields; with neither flag all scored ones do, for `config.data.filter="similarity>=0.28"`.
"""

import argparse
import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, Int64

from clip_jax.data.dataset import open_all_shards
from clip_jax.data.shards import Shard
from clip_jax.data.skip_log import SkipLog
from clip_jax.data.sources import fingerprint
from clip_jax.data.writing.scores import FIELD, part_path, read_scores, select, write_part
from clip_jax.data.writing.shard_set import (
    PER_SHARD,
    ShardSet,
    WrittenShards,
    claim_shard_folder,
    write_set,
)
from clip_jax.errors import UserError, check_counts, run_command
from clip_jax.files import claim_folder
from clip_jax.progress_bar import progress_bar
from clip_jax.sections import DataSection, EvalSection
from clip_jax.tools.data_shard import written_text

if TYPE_CHECKING:
    from clip_jax.evaluation.encoders import Encoders

SCORES, BUILD_INFO = "scores", "scores.json"
PART_ROWS = 8192
"""Samples of a part of the scores, about."""

_DATA, _EVAL = DataSection(), EvalSection()


@dataclass(frozen=True, eq=False)
class FilterResult:
    """The scores of a source, and the pairs that were selected by them.

    Attributes:
      score_folder: where the scores are stored.
      scores_B: the similarity of every sample in the order of the data; NaN is no score.
      skipped: cause -> samples without a score.
      lost_shards: (cause, name, detail) of each shard of the source that cannot be read.
      rows: places of the selected samples; None where only scores were asked for.
      written: the shards of the selected samples; None as `rows`.
    """

    score_folder: Path
    scores_B: Float32[np.ndarray, " samples"]
    skipped: Counter[str]
    lost_shards: tuple[tuple[str, str, str], ...]
    rows: Int64[np.ndarray, " selected"] | None = None
    written: WrittenShards | None = None


def score_set(
    encoders: "Encoders",
    shards: Sequence[Shard],
    folder: Path,
    *,
    batch_size: int,
    threads: int,
) -> tuple[Float32[np.ndarray, " samples"], Counter[str]]:
    """Return the score of every sample, in the order of the data, and what was skipped.

    Parts that are in the folder are not made again. In memory are a part and 4 bytes a sample.

    Raises:
      UserError: the folder is another model's or other data's, or features are not finite.
    """
    from clip_jax.evaluation.similarity import similarities

    batch_size = encoders.round_batch_size(batch_size)
    per_part = max(1, PART_ROWS // batch_size)
    build_info = {
        "model": encoders.identity,
        "data": fingerprint(shards),
        "--batch-size": batch_size,
        "batches of a part": per_part,
        "preprocessing": repr((encoders.image_size, encoders.preprocess)),
    }
    claim_folder(folder, build_info, name=BUILD_INFO)
    total = sum(map(len, shards))
    parts = math.ceil(total / (per_part * batch_size))
    done = next((n for n in range(parts) if not part_path(folder, n).exists()), parts)
    with contextlib.ExitStack() as stack:
        start = done * per_part * batch_size
        progress = stack.enter_context(progress_bar(total, "score", initial=min(start, total)))
        loader = stack.enter_context(
            encoders.loader(
                shards, batch_size=batch_size, steps=slice(done * per_part, None), threads=threads
            )
        )
        for part in range(done, parts):
            before, keys, scores = Counter(loader.skipped), [], []
            for batch in itertools.islice(loader, per_part):
                # The last batch is filled up with rows that are not samples.
                batch_keys = [key for key in batch["key"] if key]
                keys += batch_keys
                scores.append(similarities(encoders, batch, batch_size)[: len(batch_keys)])
                progress.update(len(batch_keys))
            skipped = Counter(loader.skipped) - before
            write_part(part_path(folder, part), keys, np.concatenate(scores), skipped)
    return read_scores(folder, parts)


def filter_set(
    source: Sequence[str],
    out: str | Path,
    encoders: "Encoders",
    *,
    threshold: float | None = None,
    top: float | None = None,
    scores_only: bool = False,
    where: str = _DATA.filter,
    batch_size: int = _EVAL.batch_size,
    per_shard: int = PER_SHARD,
    threads: int = _DATA.threads,
) -> FilterResult:
    """Score a source, select pairs by their scores, and write those as shards.

    Args:
      source: as `config.data.train` takes them.
      out: the folder for scores and shards.
      threshold, top: the lowest score, and the share, that is selected; see `scores.select`.
      scores_only: write no shards.
      where: as `config.data.filter`.
      batch_size: pairs scored at a time.
      per_shard: samples of a shard.
      threads: that read and decode.

    Raises:
      UserError: the source holds nothing, nothing that can be scored, or nothing that is selected;
        `out` holds something else.
    """
    log, folder = SkipLog(), Path(out)
    shards = open_all_shards(source, where=where, log=log)
    scores_B, skipped = score_set(
        encoders, shards, folder / SCORES, batch_size=batch_size, threads=threads
    )
    if np.isnan(scores_B).all():
        text = scores_text(scores_B, skipped, folder / SCORES)
        raise UserError(" ".join(text.splitlines()))
    result = FilterResult(folder / SCORES, scores_B, skipped, tuple(log.excluded_shards))
    if scores_only:
        return result
    rows = select(scores_B, threshold=threshold, top=top)
    shard_set = ShardSet(
        shards,
        rows,
        folder / selection_name(threshold, top),
        per_shard,
        # Exactly the score, so that a filter on the field selects what a threshold selects.
        extra=lambda place: {FIELD: float(scores_B[rows[place]])},
    )
    claim_shard_folder(shard_set, {"model": encoders.identity, "--per-shard": per_shard})
    with progress_bar(len(rows), "write") as progress:
        written = write_set(shard_set, threads=threads, on_rows=progress.update)
    return replace(result, rows=rows, written=written)


def selection_name(threshold: float | None, top: float | None) -> str:
    """Return the folder of a selection; several may lie beside one set of scores."""
    parts = [f"{FIELD}-{threshold:g}"] if threshold is not None else []
    parts += [f"top-{top:g}"] if top is not None else []
    return "-".join(parts) or "all"


def result_text(result: FilterResult) -> str:
    """Return what the command prints."""
    lines = [scores_text(result.scores_B, result.skipped, result.score_folder)]
    lines += [f"left out: {name}: {cause}" for cause, name, _ in result.lost_shards]
    if result.rows is not None and result.written is not None:
        share = len(result.rows) / len(result.scores_B)
        lines.append(f"kept {share:.1%}: {written_text(result.written)}")
    return "\n".join(lines)


def scores_text(
    scores_B: Float32[np.ndarray, " samples"], skipped: Counter[str], folder: Path
) -> str:
    """Return the lines on how the scores are spread, and why some samples have none."""
    scored = scores_B[~np.isnan(scores_B)]
    lines = [f"{len(scored):,} of {len(scores_B):,} pairs scored: {folder}/part-*.parquet"]
    if len(scored):
        shares = (0.05, 0.25, 0.5, 0.75, 0.95)
        quantiles = ", ".join(
            f"{share:.0%} below {value:.4f}"
            for share, value in zip(shares, np.quantile(scored, shares), strict=True)
        )
        lines.append(f"{FIELD} {scored.min():.4f} to {scored.max():.4f}: {quantiles}")
    if skipped:
        causes = ", ".join(f"{n:,} {cause}" for cause, n in sorted(skipped.items()))
        lines.append(f"not scored: {causes}")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.data.filter", description=__doc__)
    add = parser.add_argument
    add("source", nargs="+", help="tar shards, a table, records, a folder, a URL")
    add("--model", required=True, help="a run, or a published model's path or name")
    add("--architecture", help='of a bare file: "NAME" or "NAME:TAG"')
    add("--tokenizer", help="its tokenizer.json or SentencePiece .model")
    add("--out", required=True, help="the folder for scores and shards")
    add("--threshold", type=float, help="lowest cosine that is selected")
    add("--top", type=float, help="share that is selected, the best ones: 0.3")
    add("--scores-only", action="store_true", help="write no shards")
    add("--filter", dest="where", default=_DATA.filter, help='as config.data.filter: "width>=200"')
    add("--batch-size", type=int, default=_EVAL.batch_size, help="pairs scored at a time")
    add("--per-shard", type=int, default=PER_SHARD, help="samples of a shard")
    add("--threads", type=int, default=_DATA.threads, help="that read and decode")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UserError if a number is out of range, before a model is loaded."""
    check_counts(
        {
            "--batch-size": args.batch_size,
            "--per-shard": args.per_shard,
            "--threads": args.threads,
        }
    )
    if args.threshold is not None and not -1 <= args.threshold <= 1:
        raise UserError(f"--threshold is {args.threshold:g}; a cosine lies between -1 and 1")
    if args.top is not None and not 0 < args.top <= 1:
        raise UserError(f"--top is {args.top:g}; it takes 0 < share <= 1, 0.3 say")


def main() -> int:
    """Parse the flags, score, write and print the result; return the exit code."""
    from clip_jax.api import load_encoders

    args = parse(None)
    check(args)
    options = vars(args)
    checkpoint = {name: options.pop(name) for name in ("model", "architecture", "tokenizer")}
    print(result_text(filter_set(encoders=load_encoders(**checkpoint), **options)))
    return 0


if __name__ == "__main__":
    run_command(main)
