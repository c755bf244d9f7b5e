"""Writer of a folder of embeddings, part by part.

A part's files appear whole and its metadata last, so a killed run goes on at its last part and
ends with the same bytes: a part is the same batches whichever process makes it, and when.
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
from clip_jax.embeddings.folder import (
    EMBEDDING_DIRNAMES,
    METADATA_DIRNAME,
    SKIPPED_DIRNAME,
    EmbeddingInfo,
    is_complete,
    part_path,
)
from clip_jax.evaluation.encoders import Encoders
from clip_jax.evaluation.features import FeatureSet, encode_parts
from clip_jax.files import atomic_write
from clip_jax.progress_bar import progress_bar

SKIPPED_FILENAME = "skipped.jsonl"
ROW_GROUP_SIZE = 4096
"""Rows of the metadata that are read together: a result's row is read with its neighbors."""


class PartLog(SkipLog):
    """A skip log that keeps the lines of the part that is being made."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, str]] = []

    def sample(self, cause: str, key: str, detail: str) -> None:
        super().sample(cause, key, detail)
        self.lines.append({"cause": cause, "name": key, "detail": detail[:500]})


def open_images(data: str) -> list[Shard]:
    """Open the shards of a source, whose images need no caption.

    Raises:
      UserError: it names nothing, or a shard cannot be read.
    """
    sources = expand(data)
    is_folder = [format_of(split_options(source)[0]) is FOLDER_FORMAT for source in sources]
    others = iter(open_shards([s for s, f in zip(sources, is_folder, strict=True) if not f]))
    return [
        open_folder(*split_options(source), need_captions=False) if folder else next(others)
        for source, folder in zip(sources, is_folder, strict=True)
    ]


def parts_of_process(parts: int, process_index: int, process_count: int) -> range:
    """Return the parts that a process makes: consecutive ones, shared out evenly."""
    return range(
        process_index * parts // process_count, (process_index + 1) * parts // process_count
    )


def embed(
    encoders: Encoders,
    shards: Sequence[Shard],
    info: EmbeddingInfo,
    folder: Path,
    *,
    process_index: int = 0,
    process_count: int = 1,
    progress: bool = True,
) -> list[int]:
    """Make the parts of this process that are not there yet; return their numbers.

    `folder.begin_folder` comes before. Processes do not wait for each other.

    Raises:
      UserError: a file cannot be written, or features are not finite.
    """
    parts = parts_of_process(info.parts, process_index, process_count)
    missing = missing_parts(folder, info, parts)
    sizes = part_sizes(info, parts)
    title = f"process {process_index} of {process_count}" if process_count > 1 else "embed"
    done = sum(sizes[n] for n in parts if n not in missing)
    total = sum(sizes.values())
    with progress_bar(total, title, " images", initial=done, shown=progress) as bar:
        for run in consecutive_runs(missing):
            _embed_run(encoders, shards, info, folder, run, bar.update)
    return missing


def missing_parts(folder: Path, info: EmbeddingInfo, parts: Sequence[int]) -> list[int]:
    """Return those parts that are not there, or not whole."""
    return [n for n in parts if not is_complete(folder, info, n)]


def part_sizes(info: EmbeddingInfo, parts: Sequence[int]) -> dict[int, int]:
    """Return the samples of each part."""
    return {n: min(info.part_rows, info.samples - n * info.part_rows) for n in parts}


def embed_part(
    encoders: Encoders, shards: Sequence[Shard], info: EmbeddingInfo, folder: Path, number: int
) -> None:
    """Make one part: the bytes that `embed` writes.

    Raises:
      UserError: a file cannot be written, or features are not finite.
    """
    _embed_run(encoders, shards, info, folder, range(number, number + 1), lambda images: None)


def consecutive_runs(numbers: Sequence[int]) -> list[range]:
    """Split ascending numbers into runs without a gap."""
    runs: list[range] = []
    for n in numbers:
        if runs and n == runs[-1].stop:
            runs[-1] = range(runs[-1].start, n + 1)
        else:
            runs.append(range(n, n + 1))
    return runs


def _embed_run(
    encoders: Encoders,
    shards: Sequence[Shard],
    info: EmbeddingInfo,
    folder: Path,
    parts: range,
    on_images: Callable[[int], object],
) -> None:
    """Make consecutive parts with one loader; `on_images` takes how many were encoded."""
    batches_per_part = info.part_rows // info.batch_size
    log = PartLog()
    loader = encoders.loader(
        shards,
        batch_size=info.batch_size,
        steps=slice(parts.start * batches_per_part, parts.stop * batches_per_part),
        need_captions=False,
        log=log,
    )

    def store(number: int, part: FeatureSet) -> None:
        write_part(folder, info, number, part, log.lines)
        log.lines.clear()

    def no_features(tokens_BL: np.ndarray) -> np.ndarray:
        return np.ones((len(tokens_BL), info.embed_dim), np.float32)

    if not info.texts:
        encoders = dataclasses.replace(encoders, encode_text=no_features)
    with loader:
        encode_parts(
            encoders,
            _one_caption_each(loader, on_images),
            store,
            text_batch_size=info.batch_size,
            batches_per_part=batches_per_part,
            first_part=parts.start,
        )


def _one_caption_each(
    batches: Loader, on_images: Callable[[int], object]
) -> Iterator[Mapping[str, Any]]:
    """Yield batches with one caption for each image, an empty one where there is none."""
    for batch in batches:
        yield {**batch, "captions": [(given or [""])[:1] for given in batch["captions"]]}
        on_images(sum(key != "" for key in batch["key"]))


def write_part(
    folder: Path,
    info: EmbeddingInfo,
    number: int,
    part: FeatureSet,
    skipped: Sequence[Mapping[str, str]],
) -> None:
    """Write a part's files, its metadata last: with that it counts as made."""

    def path(dirname: str) -> Path:
        return part_path(folder, dirname, number, info.parts)

    arrays = {"image": part.z_image_BD} | ({"text": part.z_text_BD} if info.texts else {})
    for kind, z_BD in arrays.items():
        with (
            atomic_write(path(EMBEDDING_DIRNAMES[kind])) as partial,
            partial.open("wb") as file,
        ):
            np.save(file, z_BD.astype(np.float16))
    with atomic_write(path(SKIPPED_DIRNAME)) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in skipped), encoding="utf-8")
    with atomic_write(path(METADATA_DIRNAME)) as partial:
        pq.write_table(metadata_table(part), partial, row_group_size=ROW_GROUP_SIZE)


def metadata_table(part: FeatureSet) -> pa.Table:
    """Return a part's table: clip-retrieval's columns, and where in its source an image is.

    `image_path` is "shard/key" and `row` the sample's position among all of the source's.
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


def finish_folder(folder: Path, info: EmbeddingInfo) -> Counter[str] | None:
    """Join the lists of skipped samples once every part is there; return their number by cause.

    None if parts are missing. Whichever process ends last finds all of them; two that do write
    the same.
    """
    if not all(is_complete(folder, info, n) for n in range(info.parts)):
        return None
    skipped: Counter[str] = Counter()
    with (
        atomic_write(folder / SKIPPED_FILENAME) as partial,
        partial.open("w", encoding="utf-8") as out,
    ):
        for number in range(info.parts):
            path = part_path(folder, SKIPPED_DIRNAME, number, info.parts)
            lines = path.read_text(encoding="utf-8")
            skipped.update(json.loads(line)["cause"] for line in lines.splitlines())
            out.write(lines)
    return skipped
