"""What is in a set: `python -m clip_jax.data.inspect SOURCE [--out DIR]`.

SOURCE is what `config.data.train` takes. Every image is read and decoded (or `--limit` of them,
at equal distances). With `--out` the folder gets `inspect.json`, `samples.png` and `bad.jsonl`.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.data.dataset import open_line
from clip_jax.data.filters import first_of_key
from clip_jax.data.images import decode_image
from clip_jax.data.loader import BUCKETS
from clip_jax.data.shards import BadSampleError, ConcatShards, Handles, Shard
from clip_jax.data.skip_log import SkipLog
from clip_jax.data.survey import SIDES, Tally, TokenLengths, histogram, quantile, spread, survey
from clip_jax.data.writing.tar_writer import read_sample
from clip_jax.errors import EXIT_INTERRUPTED, UserError, run_command
from clip_jax.evaluation.plots import IMAGE_SIDE, caption_grid
from clip_jax.files import atomic_write
from clip_jax.progress_bar import progress_bar
from clip_jax.tokenizers import make_tokenizer
from clip_jax.typing import Tokenizer

_BAR = 40


def survey_text(facts: dict[str, Any]) -> str:
    """What the command prints."""
    lines = _head(facts)
    if facts["pictures"]:
        lines += _captions(facts) + _pictures(facts)
    return "\n".join(lines)


def _row(name: str, text: str) -> str:
    return f"{name:<11} {text}"


def _bar(share: float) -> str:
    return "#" * round(share * _BAR)


def _head(facts: dict[str, Any]) -> list[str]:
    looked, bad = facts["looked_at"], sum(facts["bad"].values())
    causes = ", ".join(f"{n:,} {cause}" for cause, n in facts["bad"].items())
    lines = [
        _row("source", " and ".join(facts["source"])),
        _row("shards", f"{facts['shards']:,}"),
        *(_row("", f"left out: {s['name']}: {s['cause']}") for s in facts["bad_shards"]),
        _row("samples", f"{facts['samples']:,}, of which {looked:,} were looked at")
        + ("" if facts["complete"] else " before the interruption"),
        _row("bad", f"{bad:,} ({bad / max(1, looked):.2%})" + (f": {causes}" if causes else "")),
    ]
    repeated, names = facts["repeated_keys"], ", ".join(facts["first_repeated_keys"])
    text = f"{repeated:,} samples have the key of an earlier one" if repeated else "all different"
    return [
        *lines,
        _row("keys", text + (f": {names}" + (", ..." if repeated > 5 else "")) * bool(names)),
    ]


def _captions(facts: dict[str, Any]) -> list[str]:
    count, tokens, longest = facts["captions"], facts["tokens"], facts["context_length"]
    if not count:
        return [_row("captions", "none; class numbers alone")]
    lines = [
        _row(
            "captions",
            f"{facts['captions_per_picture']:.2f} a picture; {tokens['low']} to {tokens['high']}"
            f" tokens, median {tokens['median']}, mean {tokens['mean']:.1f};"
            f" {facts['cut_captions'] / count:.2%} longer than {longest}, which are cut",
        ),
        _row("", f"tokens up to   captions   batches of {facts['batch_size']}"),
    ]
    for bucket in facts["buckets"]:
        share = bucket["captions"] / count
        lines.append(
            _row(
                "",
                f"{bucket['tokens']:12}   {share:8.2%}   {bucket['batches']:8.2%}  {_bar(share)}",
            )
        )
    return lines


def _pictures(facts: dict[str, Any]) -> list[str]:
    count, side = facts["pictures"], facts["short_side"]
    kinds = ", ".join(f"{kind} {n / count:.1%}" for kind, n in facts["kinds"].items())
    sizes = ", ".join(f"{w} x {h} ({n / count:.1%})" for w, h, n in facts["sizes"])
    lines = [
        _row("pictures", f"{kinds}; {facts['bytes_per_picture'] / 1024:,.1f} KiB each"),
        _row("", f"most frequent sizes: {sizes}"),
        _row("", f"short side {side['low']} to {side['high']} pixels, median {side['median']}"),
    ]
    for bound, n in facts["short_sides"].items():
        if n:
            name = f"up to {bound:>4}" if bound != "more" else "more"
            lines.append(_row("", f"{name:>12}   {n / count:8.2%}  {_bar(n / count)}"))
    if facts["labelled"]:
        lines.append(
            _row("classes", f"{facts['classes']:,} numbers on {facts['labelled'] / count:.1%}")
        )
    for i, (name, about) in enumerate(facts["fields"].items()):
        bounds = f", {about['low']:g} to {about['high']:g}" if "low" in about else ""
        text = f"{name} in {about['samples'] / count:.1%}{bounds}"
        lines.append(_row("" if i else "fields", text))
    return lines


GRID = 24
_LONGEST = 512  # tokens that a caption is measured to


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.data.inspect", description=__doc__)
    parser.add_argument("source", nargs="+", help="tar shards, a table, records, a folder, a URL")
    parser.add_argument("--out", help="folder for the sample grid, the figures and the bad samples")
    parser.add_argument("--limit", type=int, help="samples to look at; all by default")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--tokenizer", default="clip", help="as config.data.tokenizer")
    parser.add_argument("--context-length", type=int, default=77, help="tokens that a model takes")
    parser.add_argument("--batch-size", type=int, default=256, help="pairs trimmed together")
    parser.add_argument("--filter", default="", help='as config.data.filter: "width>=200"')
    parser.add_argument("--threads", type=int, default=4, help="that decode")
    return parser.parse_args(argv)


def lengths_by(tokenizer: Tokenizer) -> TokenLengths:
    """Tokens of captions, their end token among them, up to `_LONGEST`."""

    def lengths(texts: list[str]) -> list[int]:
        ends = tokenizer(texts, _LONGEST) == tokenizer.eot_id
        return np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, _LONGEST).tolist()

    return lengths


def inspect(
    source: Sequence[str],
    *,
    out: str | None = None,
    limit: int | None = None,
    tokenizer: str = "clip",
    context_length: int = 77,
    batch_size: int = 256,
    where: str = "",
    threads: int = 4,
) -> dict[str, Any]:
    """Look at a set and return the figures; after Ctrl-C they are of the part that was seen.

    Raises:
      UserError: the source holds nothing, or a number is out of range.
    """
    numbers = {"--limit": limit, "--threads": threads, "--batch-size": batch_size}
    for flag, value in numbers.items():
        if value is not None and value < 1:
            raise UserError(f"{flag} is {value}; it takes 1 or more")
    lengths, log = lengths_by(make_tokenizer(tokenizer)), SkipLog()
    indexes = open_line(source, where=where, log=log)
    rows = spread(sum(map(len, indexes)), limit)
    tally = Tally()
    with progress_bar(len(rows), "inspect", "sample") as progress:
        try:
            for part in survey(indexes, rows, lengths, threads=threads):
                tally.add(part)
                progress.update(part.looked)
        except KeyboardInterrupt:
            pass  # what was seen is told
    facts = {
        "source": list(source),
        "complete": tally.looked == len(rows),
        **_of_shards(indexes, log),
        **figures(tally, context_length, batch_size),
    }
    if out is not None:
        _write(Path(out), facts, tally, indexes, rows[: tally.looked])
    return facts


def _of_shards(indexes: Sequence[Shard], log: SkipLog) -> dict[str, Any]:
    first = first_of_key(indexes)
    line = ConcatShards(indexes)
    places = [line.at(row) for row in np.flatnonzero(~first)[:5].tolist()]
    return {
        "shards": len(indexes),
        "bad_shards": [{"cause": c, "name": n, "detail": d} for c, n, d in log.lost],
        "samples": len(first),
        "repeated_keys": int((~first).sum()),
        "first_repeated_keys": [f"{index.name}/{index.key(i)}" for index, i in places],
    }


def figures(tally: Tally, context_length: int, batch_size: int) -> dict[str, Any]:
    """Shares and quantiles of what was counted."""
    buckets = [b for b in BUCKETS if b < context_length] + [context_length]
    by_bucket = histogram(tally.tokens, buckets)
    by_bucket[-2] += by_bucket[-1]  # too long ones are cut to the last bucket
    within = np.cumsum(by_bucket[:-1]) / max(1, tally.tokens.total())
    # A batch is as long as its longest caption.
    batches = np.diff(within**batch_size, prepend=0.0)
    sides: Counter[int] = Counter()
    for size, count in tally.sizes.items():
        sides[min(size)] += count
    good = tally.sizes.total()
    return {
        "looked_at": tally.looked,
        "bad": dict(tally.bad.most_common()),
        "captions": tally.tokens.total(),
        "captions_per_picture": tally.tokens.total() / max(1, good),
        "tokens": _quantiles(tally.tokens),
        "cut_captions": sum(n for length, n in tally.tokens.items() if length > context_length),
        "context_length": context_length,
        "batch_size": batch_size,
        "buckets": [
            {"tokens": b, "captions": int(n), "batches": float(share)}
            for b, n, share in zip(buckets, by_bucket, batches, strict=False)
        ],
        "pictures": good,
        "bytes_per_picture": tally.image_bytes / max(1, good),
        "kinds": dict(tally.kinds.most_common()),
        "short_side": _quantiles(sides),
        "short_sides": dict(zip(map(str, (*SIDES, "more")), histogram(sides, SIDES), strict=True)),
        "sizes": [[*size, n] for size, n in tally.sizes.most_common(5)],
        "labelled": tally.labels.total(),
        "classes": len(tally.labels),
        "fields": {
            name: {"samples": tally.numbers[name] + tally.words[name]}
            | ({"low": tally.lows[name], "high": tally.highs[name]} if name in tally.lows else {})
            for name in sorted(tally.numbers | tally.words)
        },
    }


def _quantiles(counts: Counter[int]) -> dict[str, Any]:
    if not counts:
        return {}
    shares = {"low": 0.0, "median": 0.5, "p95": 0.95, "high": 1.0}
    mean = sum(v * n for v, n in counts.items()) / counts.total()
    return {name: quantile(counts, share) for name, share in shares.items()} | {"mean": mean}


def _write(
    out: Path,
    facts: dict[str, Any],
    tally: Tally,
    indexes: Sequence[Shard],
    rows: np.ndarray,
) -> None:
    with atomic_write(out / "inspect.json") as partial:
        partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    with atomic_write(out / "bad.jsonl") as partial, partial.open("w", encoding="utf-8") as file:
        for cause, name, detail in tally.named:
            file.write(json.dumps({"cause": cause, "name": name, "detail": detail}) + "\n")
    images, captions = some_samples(indexes, rows)
    if images:
        caption_grid(images, captions, out / "samples.png")


def some_samples(indexes: Sequence[Shard], rows: np.ndarray) -> tuple[list[np.ndarray], list[str]]:
    """Images and captions of `GRID` of these samples, at equal distances where they are good."""
    images, captions = [], []
    candidates = rows[spread(len(rows), 4 * GRID)]
    line = ConcatShards(indexes)
    with Handles() as handles:
        for row in np.concatenate([candidates[k::4] for k in range(4)]).tolist():
            try:
                sample = read_sample(*line.at(row), handles)
                image = decode_image(sample.image).convert("RGB")
            except (BadSampleError, OSError):
                continue
            image.thumbnail((2 * IMAGE_SIDE, 2 * IMAGE_SIDE))
            images.append(np.asarray(image))
            captions.append(" | ".join(sample.captions) or f"class {sample.label}")
            if len(images) == GRID:
                break
    return images, captions


def main() -> int:
    """Parse and look; the exit code."""
    args = parse(None)
    facts = inspect(
        args.source,
        out=args.out,
        limit=args.limit,
        tokenizer=args.tokenizer,
        context_length=args.context_length,
        batch_size=args.batch_size,
        where=args.filter,
        threads=args.threads,
    )
    print(json.dumps(facts, indent=1) if args.json else survey_text(facts))
    if args.out is not None and not args.json:
        print(f"written: {args.out}/inspect.json, samples.png, bad.jsonl")
    return 0 if facts["complete"] else EXIT_INTERRUPTED


if __name__ == "__main__":
    run_command(main)
