"""Select pairs by a model's scores: `python -m clip_jax.data.filter SOURCE --model M --out DIR
--threshold 0.28` (or `--top 0.3`).

A score is the cosine of an image and its caption. DIR/scores stores them, part by part, and the
same command goes on after a kill. The selected pairs become tar shards, `similarity` among their
fields; with neither flag all scored ones do, for `config.data.filter="similarity>=0.28"`. With
`--executor ray` a cluster scores and writes.
"""

import argparse
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from clip_jax.evaluation.batch_parts import BatchParts
from clip_jax.executors.parts import Executor, PartMaker
from clip_jax.executors.pool import WorkerPool
from clip_jax.files import check_local, claim_folder
from clip_jax.progress_bar import progress_bar
from clip_jax.sections import DataSection, EvalSection
from clip_jax.tools.absolute_paths import absolute_checkpoint, absolute_source
from clip_jax.tools.data_shard import write_set_on, writer_of, written_text
from clip_jax.tools.executor_flags import add_executor_flags, executor_of, pop_executor_flags

if TYPE_CHECKING:
    from clip_jax.evaluation.encoders import Encoders

SCORES, BUILD_INFO = "scores", "scores.json"
PART_ROWS = 8192
"""Samples of a part of the scores, about."""

MODULE = "clip_jax.tools.data_filter"
"""Its name where it is imported: the command itself is `__main__`."""

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


@dataclass(frozen=True, eq=False)
class ScoreJob:
    """The scoring of a source by a model, in parts.

    Attributes:
      encoders: the model.
      shards: the source.
      folder: of the parts.
      batch_size: pairs scored at a time, as devices share them.
      threads: that read and decode.
    """

    encoders: "Encoders"
    shards: Sequence[Shard]
    folder: Path
    batch_size: int
    threads: int

    @property
    def parts(self) -> BatchParts:
        """Return how the source is cut."""
        return BatchParts(sum(map(len, self.shards)), self.batch_size, PART_ROWS)

    @property
    def build_info(self) -> dict[str, Any]:
        """Return what the folder's parts are made of."""
        return {
            "model": self.encoders.identity,
            "data": fingerprint(self.shards),
            "--batch-size": self.batch_size,
            "batches of a part": self.parts.batches,
            "preprocessing": repr((self.encoders.image_size, self.encoders.preprocess)),
        }

    def claim(self, *, write: bool = True) -> bool:
        """Begin the folder, or check that it was begun for the same; return whether it was.

        Raises:
          UserError: the folder is another model's or other data's.
        """
        return claim_folder(self.folder, self.build_info, name=BUILD_INFO, write=write)

    def score(self, parts: range, on_rows: Callable[[int], object]) -> None:
        """Write consecutive parts with one loader; `on_rows` takes how many were scored.

        Raises:
          UserError: features are not finite, or a part cannot be written.
        """
        from clip_jax.evaluation.similarity import similarities

        per_part = self.parts.batches
        with self.encoders.loader(
            self.shards,
            batch_size=self.batch_size,
            steps=slice(parts.start * per_part, parts.stop * per_part),
            threads=self.threads,
        ) as loader:
            for part in parts:
                before, keys, scores = Counter(loader.skipped), [], []
                for batch in itertools.islice(loader, per_part):
                    # The last batch is filled up with rows that are not samples.
                    batch_keys = [key for key in batch["key"] if key]
                    keys += batch_keys
                    scores_B = similarities(self.encoders, batch, self.batch_size)
                    scores.append(scores_B[: len(batch_keys)])
                    on_rows(len(batch_keys))
                skipped = Counter(loader.skipped) - before
                write_part(part_path(self.folder, part), keys, np.concatenate(scores), skipped)


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
    job = ScoreJob(encoders, shards, folder, encoders.round_batch_size(batch_size), threads)
    job.claim()
    sizes = job.parts.sizes
    parts = len(sizes)
    done = next((n for n in range(parts) if not part_path(folder, n).exists()), parts)
    with progress_bar(sum(sizes), "score", initial=sum(sizes[:done])) as progress:
        job.score(range(done, parts), progress.update)
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
    result = _scored(folder, scores_B, skipped, log)
    if scores_only:
        return result
    choice = Selection(folder, threshold, top, per_shard, encoders.identity)
    shard_set = choice.shard_set(shards, scores_B)
    claim_shard_folder(shard_set, choice.options)
    with progress_bar(len(shard_set.rows), "write") as progress:
        written = write_set(shard_set, threads=threads, on_rows=progress.update)
    return replace(result, rows=shard_set.rows, written=written)


def _scored(
    folder: Path, scores_B: Float32[np.ndarray, " samples"], skipped: Counter[str], log: SkipLog
) -> FilterResult:
    """Return the result of scoring.

    Raises:
      UserError: no sample has a score.
    """
    if np.isnan(scores_B).all():
        text = scores_text(scores_B, skipped, folder / SCORES)
        raise UserError(" ".join(text.splitlines()))
    return FilterResult(folder / SCORES, scores_B, skipped, tuple(log.excluded_shards))


@dataclass(frozen=True)
class Selection:
    """The choice of samples by their scores, and the shards it becomes.

    Attributes:
      folder: of the command; the shards get one in it.
      threshold, top: as `scores.select` takes them.
      per_shard: samples of a shard.
      model: the identity of the weights that scored.
    """

    folder: Path
    threshold: float | None
    top: float | None
    per_shard: int
    model: str

    @property
    def options(self) -> dict[str, Any]:
        """What the folder of the shards remembers."""
        return {"model": self.model, "--per-shard": self.per_shard}

    def shard_set(
        self, shards: Sequence[Shard], scores_B: Float32[np.ndarray, " samples"]
    ) -> ShardSet:
        """Return the set of shards.

        Raises:
          UserError: no sample is selected.
        """
        rows = select(scores_B, threshold=self.threshold, top=self.top)
        return ShardSet(
            shards,
            rows,
            self.folder / selection_name(self.threshold, self.top),
            self.per_shard,
            # Exactly the score, so that a filter on the field selects what a threshold selects.
            extra=lambda place: {FIELD: float(scores_B[rows[place]])},
        )


def filter_on(
    executor: Executor, args: argparse.Namespace, checkpoint: Mapping[str, str | None]
) -> FilterResult:
    """Score, select and write as `filter_set` does, on the workers of an executor.

    Args:
      args: the command line.
      checkpoint: the arguments of `api.load_encoders`.

    Raises:
      UserError: as `filter_set`, or the workers do not see the same files.
    """
    log, folder = SkipLog(), Path(args.out).absolute()
    data = {"source": [absolute_source(one) for one in args.source], "where": args.where}
    numbers = {"batch_size": args.batch_size, "threads": args.threads}
    model = absolute_checkpoint(checkpoint)
    scorer = data | numbers | {"checkpoint": model, "folder": str(folder)}
    with WorkerPool(executor, f"{MODULE}:open_scorer", scorer, uses_devices=True) as pool:
        build_info, sizes = pool.info()
        claim_folder(folder / SCORES, build_info, name=BUILD_INFO)
        rows = dict(enumerate(sizes))
        missing = [n for n in rows if not part_path(folder / SCORES, n).exists()]
        pool.run(rows, missing, title="score")
    scores_B, skipped = read_scores(folder / SCORES, len(sizes))
    shards = open_all_shards(args.source, where=args.where, log=log)
    result = _scored(Path(args.out), scores_B, skipped, log)
    if args.scores_only:
        return result
    choice = Selection(
        Path(args.out), args.threshold, args.top, args.per_shard, build_info["model"]
    )
    shard_set = choice.shard_set(shards, scores_B)
    claim_shard_folder(shard_set, choice.options)
    writer = data | {"parts": len(sizes), "choice": asdict(choice) | {"folder": str(folder)}}
    with WorkerPool(executor, f"{MODULE}:open_selected", writer, uses_devices=False) as pool:
        written = write_set_on(pool, shard_set, title="write")
    return replace(result, rows=shard_set.rows, written=written)


def open_scorer(
    source: Sequence[str],
    where: str,
    folder: str,
    checkpoint: Mapping[str, Any],
    batch_size: int,
    threads: int,
) -> PartMaker:
    """Open what a worker scores with."""
    from clip_jax.api import load_encoders

    shards = open_all_shards(source, where=where, log=SkipLog())
    encoders = load_encoders(**checkpoint)
    scores = Path(folder) / SCORES
    job = ScoreJob(encoders, shards, scores, encoders.round_batch_size(batch_size), threads)
    return PartMaker(
        (job.build_info, job.parts.sizes),
        make=lambda part: job.score(range(part, part + 1), lambda rows: None),
        folder=scores,
        is_begun=lambda: job.claim(write=False),
    )


def open_selected(
    source: Sequence[str], where: str, parts: int, choice: Mapping[str, Any]
) -> PartMaker:
    """Open what a worker writes selected pairs from; `choice` are `Selection`'s fields."""
    selection = Selection(**{**choice, "folder": Path(choice["folder"])})
    shards = open_all_shards(source, where=where, log=SkipLog())
    scores_B, _ = read_scores(selection.folder / SCORES, parts)
    return writer_of(selection.shard_set(shards, scores_B), selection.options)


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
    add_executor_flags(parser)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UserError if a flag is not fit, before a model is loaded."""
    check_local({"--out": args.out})
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
    with executor_of(pop_executor_flags(args)) as executor:
        if executor is None:
            result = filter_set(encoders=load_encoders(**checkpoint), **options)
        else:
            result = filter_on(executor, args, checkpoint)
    print(result_text(result))
    return 0


if __name__ == "__main__":
    run_command(main)
