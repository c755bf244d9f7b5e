"""Count what is in a set: `python -m clip_jax.data.inspect SOURCE [--out DIR]`.

SOURCE is what `config.data.train` takes. Every image is read and decoded (or `--limit` of them,
at equal distances). With `--out` the folder gets `inspect.json`, `samples.png` and `bad.jsonl`.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from clip_jax.data.dataset import open_all_shards
from clip_jax.data.filters import first_of_each_key
from clip_jax.data.images import decode_image
from clip_jax.data.loader import BUCKETS, caption_lengths
from clip_jax.data.shards import BadSampleError, ConcatShards, Handles, Shard
from clip_jax.data.skip_log import SkipLog
from clip_jax.data.survey import (
    SIDES,
    SurveyCounts,
    TokenLengths,
    evenly_spaced,
    histogram,
    quantile,
    survey,
)
from clip_jax.data.writing.tar_writer import read_sample
from clip_jax.errors import EXIT_INTERRUPTED, Terminated, check_counts, plain, run_command
from clip_jax.evaluation.plots import IMAGE_SIDE, caption_grid
from clip_jax.files import atomic_write, check_local
from clip_jax.models.text import TextConfig
from clip_jax.progress_bar import progress_bar
from clip_jax.sections import DataSection, TrainSection
from clip_jax.tokenizers import make_tokenizer
from clip_jax.typing import Tokenizer

GRID = 24
"""Images of `samples.png`."""

_MAX_TOKENS = 512  # that a caption is measured to
_BAR_WIDTH = 40
_DATA, _TRAIN = DataSection(), TrainSection()


@dataclass(frozen=True)
class Quantiles:
    """The spread of what was counted: the lowest, the median, 95 % at most this, the highest."""

    low: int
    median: int
    p95: int
    high: int
    mean: float


@dataclass(frozen=True)
class Bucket:
    """A length that batches are trimmed to: captions that need it, and the share of batches."""

    tokens: int
    captions: int
    batches: float


@dataclass(frozen=True)
class FieldCount:
    """A field of the samples' records: how many have it, and the bounds of its numbers."""

    samples: int
    low: int | float | None = None
    high: int | float | None = None


@dataclass(frozen=True)
class Inspection:
    """The contents of a set, as far as it was looked at.

    Attributes:
      source: the sources, as `config.data.train` takes them.
      complete: False after an interruption.
      shards: shards that can be read.
      lost_shards: (cause, name, detail) of the others.
      samples: in all shards that can be read.
      repeated_keys: samples whose key came before; `first_repeated_keys` names five.
      looked_at: samples that were read and decoded.
      bad: cause -> samples that cannot be used.
      bad_samples: (cause, "shard/key", detail) of each, 100,000 at most.
      captions: of all good samples together.
      tokens: length of a caption; None where there is none.
      cut_captions: captions longer than `context_length`.
      buckets: the lengths that batches of `batch_size` are trimmed to.
      images: good ones, of which the fields below speak.
      kinds: "jpg RGB" -> images.
      short_side: pixels; None where there is no good image.
      short_sides: upper bound in pixels, or "more" -> images.
      sizes: (width, height, images) of the five most frequent sizes.
      labeled: images with a class number.
      classes: different class numbers.
      fields: name -> what the samples have in it.
    """

    source: tuple[str, ...]
    complete: bool
    shards: int
    lost_shards: tuple[tuple[str, str, str], ...]
    samples: int
    repeated_keys: int
    first_repeated_keys: tuple[str, ...]
    looked_at: int
    bad: dict[str, int]
    bad_samples: tuple[tuple[str, str, str], ...]
    captions: int
    captions_per_image: float
    tokens: Quantiles | None
    cut_captions: int
    context_length: int
    batch_size: int
    buckets: tuple[Bucket, ...]
    images: int
    bytes_per_image: float
    kinds: dict[str, int]
    short_side: Quantiles | None
    short_sides: dict[str, int]
    sizes: tuple[tuple[int, int, int], ...]
    labeled: int
    classes: int
    fields: dict[str, FieldCount]


def inspect(
    source: Sequence[str],
    *,
    out: str | Path | None = None,
    limit: int | None = None,
    tokenizer: str = _DATA.tokenizer,
    context_length: int = TextConfig.context_length,
    batch_size: int = _TRAIN.batch_size,
    where: str = _DATA.filter,
    threads: int = _DATA.threads,
) -> Inspection:
    """Look at a set; after Ctrl-C the figures are of the part that was seen.

    Args:
      source: as `config.data.train` takes them.
      out: a folder for the figures, the bad samples and a grid of images.
      limit: samples to look at, at equal distances; None looks at all.
      tokenizer: as `config.data.tokenizer`.
      context_length: tokens that a model takes.
      batch_size: pairs that are trimmed together.
      where: as `config.data.filter`.
      threads: that decode.

    Raises:
      UserError: the source holds nothing, a number is out of range, or `out` cannot be written.
    """
    check_counts({"--limit": limit, "--threads": threads, "--batch-size": batch_size})
    lengths, log = lengths_by(make_tokenizer(tokenizer)), SkipLog()
    shards = open_all_shards(source, where=where, log=log)
    rows = evenly_spaced(sum(map(len, shards)), limit)
    counts = SurveyCounts()
    with progress_bar(len(rows), "inspect", "sample") as progress:
        try:
            for part in survey(shards, rows, lengths, threads=threads):
                counts.add(part)
                progress.update(part.samples)
        except Terminated:
            raise
        except KeyboardInterrupt:
            pass  # the figures are of what was seen
    inspection = Inspection(
        source=tuple(source),
        complete=counts.samples == len(rows),
        lost_shards=tuple(log.excluded_shards),
        **_key_figures(shards),
        **_caption_figures(counts, context_length, batch_size),
        **_image_figures(counts),
    )
    if out is not None:
        _write(Path(out), inspection, shards, rows[: counts.samples])
    return inspection


def lengths_by(tokenizer: Tokenizer) -> TokenLengths:
    """Return a function from captions to tokens, the end token among them, up to a limit."""

    def lengths(texts: list[str]) -> list[int]:
        return caption_lengths(tokenizer(texts, _MAX_TOKENS), tokenizer.eot_id).tolist()

    return lengths


def _key_figures(shards: Sequence[Shard]) -> dict[str, Any]:
    is_first = first_of_each_key(shards)
    samples = ConcatShards(shards)
    repeated = [samples.at(row) for row in np.flatnonzero(~is_first)[:5].tolist()]
    return {
        "shards": len(shards),
        "samples": len(is_first),
        "repeated_keys": int((~is_first).sum()),
        "first_repeated_keys": tuple(f"{shard.name}/{shard.key(i)}" for shard, i in repeated),
    }


def _caption_figures(counts: SurveyCounts, context_length: int, batch_size: int) -> dict[str, Any]:
    bounds = [b for b in BUCKETS if b < context_length] + [context_length]
    captions = histogram(counts.tokens, bounds)
    captions[-2] += captions[-1]  # too long ones are cut to the last bucket
    within = np.cumsum(captions[:-1]) / max(1, counts.tokens.total())
    # A batch is as long as its longest caption.
    batches = np.diff(within**batch_size, prepend=0.0)
    return {
        "captions": counts.tokens.total(),
        "captions_per_image": counts.tokens.total() / max(1, counts.sizes.total()),
        "tokens": _quantiles(counts.tokens),
        "cut_captions": sum(n for length, n in counts.tokens.items() if length > context_length),
        "context_length": context_length,
        "batch_size": batch_size,
        "buckets": tuple(
            Bucket(bound, int(n), float(share))
            for bound, n, share in zip(bounds, captions, batches, strict=False)
        ),
    }


def _image_figures(counts: SurveyCounts) -> dict[str, Any]:
    short_sides: Counter[int] = Counter()
    for size, count in counts.sizes.items():
        short_sides[min(size)] += count
    images = counts.sizes.total()
    return {
        "looked_at": counts.samples,
        "bad": dict(counts.bad.most_common()),
        "bad_samples": tuple(counts.bad_samples),
        "images": images,
        "bytes_per_image": counts.image_bytes / max(1, images),
        "kinds": dict(counts.formats.most_common()),
        "short_side": _quantiles(short_sides),
        "short_sides": dict(
            zip(map(str, (*SIDES, "more")), histogram(short_sides, SIDES), strict=True)
        ),
        "sizes": tuple((*size, count) for size, count in counts.sizes.most_common(5)),
        "labeled": counts.labels.total(),
        "classes": len(counts.labels),
        "fields": {
            name: FieldCount(
                counts.number_fields[name] + counts.other_fields[name],
                counts.minima.get(name),
                counts.maxima.get(name),
            )
            for name in sorted(counts.number_fields | counts.other_fields)
        },
    }


def _quantiles(counts: Counter[int]) -> Quantiles | None:
    if not counts:
        return None
    low, median, p95, high = (quantile(counts, share) for share in (0.0, 0.5, 0.95, 1.0))
    mean = sum(value * n for value, n in counts.items()) / counts.total()
    return Quantiles(low, median, p95, high, mean)


def _write(
    out: Path, inspection: Inspection, shards: Sequence[Shard], rows: Int64[np.ndarray, " rows"]
) -> None:
    """Write the figures, the bad samples and a grid of images into a folder."""
    with atomic_write(out / "inspect.json") as partial:
        partial.write_text(json.dumps(result_json(inspection), indent=1) + "\n", encoding="utf-8")
    with atomic_write(out / "bad.jsonl") as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in _records(inspection.bad_samples))
    images, captions = some_samples(shards, rows)
    if images:
        caption_grid(images, captions, out / "samples.png")


def some_samples(
    shards: Sequence[Shard], rows: Int64[np.ndarray, " rows"]
) -> tuple[list[np.ndarray], list[str]]:
    """Return images and captions of `GRID` of these samples, at equal distances if all are good."""
    images, captions = [], []
    candidates = rows[evenly_spaced(len(rows), 4 * GRID)]
    samples = ConcatShards(shards)
    with Handles() as handles:
        for row in np.concatenate([candidates[k::4] for k in range(4)]).tolist():
            try:
                sample = read_sample(*samples.at(row), handles)
                image = decode_image(sample.image).convert("RGB")
            except (BadSampleError, OSError):
                continue
            image.thumbnail((2 * IMAGE_SIDE, 2 * IMAGE_SIDE))
            images.append(np.asarray(image))
            captions.append(" | ".join(sample.captions) or f"class {sample.label}")
            if len(images) == GRID:
                break
    return images, captions


# Keys of `inspect.json` that were published under other names.
_JSON_KEYS = {
    "lost_shards": "bad_shards",
    "captions_per_image": "captions_per_picture",
    "images": "pictures",
    "bytes_per_image": "bytes_per_picture",
    "labeled": "labelled",
}


def result_json(inspection: Inspection) -> dict[str, Any]:
    """Return what `inspect.json` holds and the command prints with `--json`."""
    values = asdict(inspection)
    del values["bad_samples"]  # in a file of their own
    values["lost_shards"] = _records(inspection.lost_shards)
    for name in ("tokens", "short_side"):
        values[name] = values[name] or {}
    for field in values["fields"].values():
        if field["low"] is None:
            del field["low"], field["high"]
    return {_JSON_KEYS.get(name, name): value for name, value in values.items()}


def _records(losses: Sequence[tuple[str, str, str]]) -> list[dict[str, str]]:
    return [{"cause": c, "name": name, "detail": d} for c, name, d in losses]


def result_text(inspection: Inspection) -> str:
    """Return what the command prints."""
    lines = _shard_lines(inspection)
    if inspection.images:
        lines += _caption_lines(inspection) + _image_lines(inspection)
    return "\n".join(lines)


def _row(name: str, text: str) -> str:
    return f"{name:<11} {text}"


def _bar(share: float) -> str:
    return "#" * round(share * _BAR_WIDTH)


def _shard_lines(inspection: Inspection) -> list[str]:
    looked_at, bad = inspection.looked_at, sum(inspection.bad.values())
    causes = ", ".join(f"{n:,} {cause}" for cause, n in inspection.bad.items())
    repeated, names = inspection.repeated_keys, ", ".join(inspection.first_repeated_keys)
    keys = f"{repeated:,} samples have the key of an earlier one" if repeated else "all different"
    return [
        _row("source", " and ".join(inspection.source)),
        _row("shards", f"{inspection.shards:,}"),
        *(_row("", f"left out: {name}: {cause}") for cause, name, _ in inspection.lost_shards),
        _row("samples", f"{inspection.samples:,}, of which {looked_at:,} were looked at")
        + ("" if inspection.complete else " before the interruption"),
        _row("bad", f"{bad:,} ({bad / max(1, looked_at):.2%})" + (f": {causes}" if causes else "")),
        _row("keys", keys + (f": {names}" + (", ..." if repeated > 5 else "")) * bool(names)),
    ]


def _caption_lines(inspection: Inspection) -> list[str]:
    count, tokens = inspection.captions, inspection.tokens
    if tokens is None:
        return [_row("captions", "none; class numbers alone")]
    lines = [
        _row(
            "captions",
            f"{inspection.captions_per_image:.2f} an image; {tokens.low} to {tokens.high} tokens,"
            f" median {tokens.median}, mean {tokens.mean:.1f};"
            f" {inspection.cut_captions / count:.2%} longer than {inspection.context_length},"
            " which are cut",
        ),
        _row("", f"tokens up to   captions   batches of {inspection.batch_size}"),
    ]
    for bucket in inspection.buckets:
        share = bucket.captions / count
        text = f"{bucket.tokens:12}   {share:8.2%}   {bucket.batches:8.2%}  {_bar(share)}"
        lines.append(_row("", text))
    return lines


def _image_lines(inspection: Inspection) -> list[str]:
    count, side = inspection.images, inspection.short_side
    kinds = ", ".join(f"{kind} {n / count:.1%}" for kind, n in inspection.kinds.items())
    sizes = ", ".join(f"{w} x {h} ({n / count:.1%})" for w, h, n in inspection.sizes)
    lines = [
        _row("images", f"{kinds}; {inspection.bytes_per_image / 1024:,.1f} KiB each"),
        _row("", f"most frequent sizes: {sizes}"),
    ]
    if side is not None:
        text = f"short side {side.low} to {side.high} pixels, median {side.median}"
        lines.append(_row("", text))
    for bound, n in inspection.short_sides.items():
        if n:
            name = f"up to {bound:>4}" if bound != "more" else "more"
            lines.append(_row("", f"{name:>12}   {n / count:8.2%}  {_bar(n / count)}"))
    if inspection.labeled:
        share = inspection.labeled / count
        lines.append(_row("classes", f"{inspection.classes:,} numbers on {share:.1%}"))
    for i, (name, field) in enumerate(inspection.fields.items()):
        bounds = "" if field.low is None else f", {field.low:g} to {field.high:g}"
        text = f"{name} in {field.samples / count:.1%}{bounds}"
        lines.append(_row("" if i else "fields", text))
    return lines


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.data.inspect", description=__doc__)
    add = parser.add_argument
    add("source", nargs="+", help="tar shards, a table, records, a folder, a URL")
    add("--out", help="folder for the sample grid, the figures and the bad samples")
    add("--limit", type=int, help="samples to look at; all by default")
    add("--json", action="store_true", help="print the figures as JSON")
    add("--tokenizer", default=_DATA.tokenizer, help="as config.data.tokenizer")
    add("--context-length", type=int, default=TextConfig.context_length, help="tokens of a model")
    add("--batch-size", type=int, default=_TRAIN.batch_size, help="pairs trimmed together")
    add("--filter", dest="where", default=_DATA.filter, help='as config.data.filter: "width>=200"')
    add("--threads", type=int, default=_DATA.threads, help="that decode")
    return parser.parse_args(argv)


def main() -> int:
    """Parse the flags, look at the set and print the figures; return the exit code."""
    options = vars(parse(None))
    check_local({"--out": options["out"]})
    as_json = options.pop("json")
    inspection = inspect(**options)
    if as_json:
        print(json.dumps(result_json(inspection), indent=1))
    else:
        print(plain(result_text(inspection)))
        if options["out"] is not None:
            print(f"written: {options['out']}/inspect.json, samples.png, bad.jsonl")
    return 0 if inspection.complete else EXIT_INTERRUPTED


if __name__ == "__main__":
    run_command(main)
