"""Images and captions to a folder of embeddings, part by part.

A part's files appear whole and its metadata last, so what was killed is made again from the last
part on, to the same bytes: a part is the same batches whoever makes it, and when.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_jax.data.formats.folders import open_folder
from clip_jax.data.formats.options import split_options
from clip_jax.data.loader import Loader
from clip_jax.data.shards import Shard
from clip_jax.data.skip_log import SkipLog
from clip_jax.data.sources import FOLDER_FORMAT, expand, format_of, open_shards
from clip_jax.embeddings.folder import METADATA, About, is_whole, part_file
from clip_jax.evaluation.encoders import Encoders
from clip_jax.evaluation.features import FeatureSet, encode_parts
from clip_jax.files import atomic_write
from clip_jax.progress_bar import progress_bar

SKIPPED = "skipped"
LIST = "skipped.jsonl"
# Of the metadata: a result's row is read with its neighbors.
GROUP_ROWS = 4096


class PartLog(SkipLog):
    """Counts skipped samples, and keeps those of the part that is being made."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, str]] = []

    def sample(self, cause: str, key: str, detail: str) -> None:
        super().sample(cause, key, detail)
        self.lines.append({"cause": cause, "name": key, "detail": detail[:500]})


def open_images(data: str) -> list[Shard]:
    """The shards of a source, whose images need no caption.

    Raises:
      UserError: it names nothing, or a shard cannot be read.
    """
    shards = expand(data)
    is_folder = [format_of(split_options(shard)[0]) is FOLDER_FORMAT for shard in shards]
    others = iter(open_shards([s for s, f in zip(shards, is_folder, strict=True) if not f]))
    return [
        open_folder(*split_options(shard), need_captions=False) if folder else next(others)
        for shard, folder in zip(shards, is_folder, strict=True)
    ]


def own_parts(parts: int, index: int, count: int) -> range:
    """The parts that process `index` of `count` makes: neighbors, and equally many."""
    return range(index * parts // count, (index + 1) * parts // count)


def embed(
    encoders: Encoders,
    indexes: Sequence[Shard],
    about: About,
    folder: Path,
    *,
    index: int = 0,
    count: int = 1,
    progress: bool = True,
) -> list[int]:
    """Make the parts of process `index` of `count` that are not there yet; returns their numbers.

    `folder.claim` comes before. Processes do not wait for each other.
    """
    mine = own_parts(about.parts, index, count)
    missing = [n for n in mine if not is_whole(folder, about, n)]
    sizes = {n: min(about.part_rows, about.samples - n * about.part_rows) for n in mine}
    title = f"process {index} of {count}" if count > 1 else "embed"
    done = sum(sizes[n] for n in mine if n not in missing)
    total = sum(sizes.values())
    with progress_bar(total, title, " images", initial=done, shown=progress) as counted:
        for run in neighbours(missing):
            _embed_run(encoders, indexes, about, folder, run, counted.update)
    return missing


def neighbours(numbers: Sequence[int]) -> list[range]:
    """Ascending numbers as runs without a gap."""
    runs: list[range] = []
    for n in numbers:
        if runs and n == runs[-1].stop:
            runs[-1] = range(runs[-1].start, n + 1)
        else:
            runs.append(range(n, n + 1))
    return runs


def _embed_run(
    encoders: Encoders,
    indexes: Sequence[Shard],
    about: About,
    folder: Path,
    run: range,
    advance: Callable[[int], object],
) -> None:
    batches_per_part = about.part_rows // about.batch_size
    log = PartLog()
    loader = encoders.loader(
        indexes,
        batch_size=about.batch_size,
        steps=slice(run.start * batches_per_part, run.stop * batches_per_part),
        need_captions=False,
        log=log,
    )

    def keep(number: int, part: FeatureSet) -> None:
        write_part(folder, about, number, part, log.lines)
        log.lines.clear()

    def no_features(tokens_BL: np.ndarray) -> np.ndarray:
        return np.ones((len(tokens_BL), about.embed_dim), np.float32)

    if not about.texts:
        encoders = dataclasses.replace(encoders, encode_text=no_features)
    with loader:
        encode_parts(
            encoders,
            _one_caption_each(loader, advance),
            keep,
            text_batch_size=about.batch_size,
            batches_per_part=batches_per_part,
            first_part=run.start,
        )


def _one_caption_each(
    batches: Loader, advance: Callable[[int], object]
) -> Iterator[Mapping[str, Any]]:
    """Batches whose images have one caption each, an empty one where there is none."""
    for batch in batches:
        yield {**batch, "captions": [(given or [""])[:1] for given in batch["captions"]]}
        advance(sum(key != "" for key in batch["key"]))


def write_part(
    folder: Path, about: About, number: int, part: FeatureSet, skipped: Sequence[Mapping[str, str]]
) -> None:
    """A part's files, its metadata last: with that it counts as made."""

    def path(kind: str) -> Path:
        return part_file(folder, kind, number, about.parts)

    arrays = {"img_emb": part.z_image_BD} | ({"text_emb": part.z_text_BD} if about.texts else {})
    for kind, z_BD in arrays.items():
        with atomic_write(path(kind)) as partial, partial.open("wb") as file:
            np.save(file, z_BD.astype(np.float16))
    with atomic_write(path(SKIPPED)) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in skipped), encoding="utf-8")
    with atomic_write(path(METADATA)) as partial:
        pq.write_table(metadata_table(part), partial, row_group_size=GROUP_ROWS)


def metadata_table(part: FeatureSet) -> pa.Table:
    """A part's table: clip-retrieval's columns, and where in its source an image is.

    `image_path` is "shard/key" and `row` the sample's place among all of the source's.
    """
    return pa.table(
        {
            "image_path": pa.array(part.keys, pa.string()),
            "caption": pa.array(part.captions, pa.string()),
            "key": pa.array([key.partition("/")[2] for key in part.keys], pa.string()),
            "label": pa.array(part.label_B, pa.int32()),
            "row": pa.array(part.row_B, pa.int64()),
        }
    )


def finish(folder: Path, about: About) -> tuple[int, Counter[str]] | None:
    """Joins the lists of skipped samples when every part is there: rows, and skipped by cause.

    None where parts are missing. Whichever process ends last finds all of them; two that do write
    the same.
    """
    if not all(is_whole(folder, about, n) for n in range(about.parts)):
        return None
    counts: Counter[str] = Counter()
    with atomic_write(folder / LIST) as partial, partial.open("w", encoding="utf-8") as out:
        for number in range(about.parts):
            lines = part_file(folder, SKIPPED, number, about.parts).read_text(encoding="utf-8")
            counts.update(json.loads(line)["cause"] for line in lines.splitlines())
            out.write(lines)
    return about.samples - counts.total(), counts
