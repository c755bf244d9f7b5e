"""Keep features in a folder, so that nothing is encoded twice.

Parts are stored as they are made: an evaluation that was killed goes on at its last part, and one
with other tasks or prompts encodes no image again. Folders are named by the data and the weights.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import numpy as np
from jaxtyping import Float32

from clip_jax.data.order import BatchPart
from clip_jax.data.sources import Shard, fingerprint
from clip_jax.errors import UserError
from clip_jax.evaluation.batch_parts import BatchParts
from clip_jax.evaluation.encoders import Encoders
from clip_jax.evaluation.features import (
    Batch,
    FeatureSet,
    concatenate,
    encode_parts,
)
from clip_jax.evaluation.zero_shot import class_embeddings
from clip_jax.files import atomic_write
from clip_jax.parallel.distributed import gather
from clip_jax.progress_bar import progress_bar

PART_ROWS = 8192


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureJob:
    """The features of some data by one model, in parts that any process can make.

    Attributes:
      shards: the data.
      folder: of the parts.
      batch_size: images at a time, as the process that reads the parts rounds them.
      identity: of the model, see `Encoders`.
      title: the data's name.
      need_captions: False takes images with neither a caption nor a class, too.
    """

    shards: Sequence[Shard]
    folder: Path
    batch_size: int
    identity: str
    title: str
    need_captions: bool

    @property
    def parts(self) -> BatchParts:
        """Return how the data is cut."""
        return BatchParts(sum(map(len, self.shards)), self.batch_size, PART_ROWS)

    @property
    def missing(self) -> list[int]:
        """Return the parts that are not there, or damaged."""
        parts = range(len(self.parts.sizes))
        return [n for n in parts if _read_whole_part(_part_path(self.folder, n)) is None]

    def encode(self, encoders: Encoders, number: int) -> None:
        """Make one part: the bytes that `encode_shards` writes.

        Raises:
          UserError: the model is another one, or features are not finite.
        """
        if encoders.identity != self.identity:
            raise UserError(f"{encoders.name}: its weights or tokenizer are others here")
        batches = self.parts.batches
        first = number * batches
        with encoders.loader(
            self.shards,
            batch_size=self.batch_size,
            steps=slice(first, first + batches),
            need_captions=self.need_captions,
        ) as loader:
            encode_parts(
                encoders,
                iter(loader),
                lambda n, part: _write_part(part, _part_path(self.folder, n)),
                text_batch_size=self.batch_size,
                batches_per_part=batches,
                first_part=number,
                skipped=lambda: loader.skipped,
            )


def encode_shards(
    encoders: Encoders,
    shards: Sequence[Shard],
    batch_size: int,
    store: Path | None,
    *,
    title: str,
    progress: bool,
    need_captions: bool = True,
) -> FeatureSet:
    """Return the features of every sample; what `store` has of them is not encoded again.

    With several processes all of them call it, and all get the whole.

    Args:
      batch_size: images at a time, rounded up to what devices and processes share equally.
      store: the folder of all features; None keeps none.
      title: the data's name, for the progress bar and for messages.
      need_captions: False takes images with neither a caption nor a class, too.

    Raises:
      UserError: features are not finite, or no image could be used.
    """
    batch_size = encoders.round_batch_size(batch_size)
    folder = None
    if store is not None:
        folder = feature_folder(store, encoders, shards, batch_size, need_captions=need_captions)
    _remove_outdated(folder)
    if encoders.encode_elsewhere is not None and folder is not None:
        encoders.encode_elsewhere(
            FeatureJob(shards, folder, batch_size, encoders.identity, title, need_captions)
        )
    with contextlib.ExitStack() as stack:

        def batches_from(start: int) -> Iterable[Batch]:
            loader = encoders.loader(
                shards,
                batch_size=batch_size,
                steps=slice(start, None),
                part=BatchPart(jax.process_index(), jax.process_count()),
                need_captions=need_captions,
            )
            return stack.enter_context(loader)

        return encode_dataset(
            encoders,
            batches_from,
            batch_size=batch_size,
            batches_per_part=BatchParts(sum(map(len, shards)), batch_size, PART_ROWS).batches,
            folder=folder,
            title=title,
            progress=progress,
        )


def encode_dataset(
    encoders: Encoders,
    batches_from: Callable[[int], Iterable[Batch]],
    *,
    batch_size: int,
    batches_per_part: int,
    folder: Path | None,
    title: str,
    progress: bool,
) -> FeatureSet:
    """Encode the batches that `folder` has no part of; return the features of all.

    With several processes all of them call it, and all get the whole.

    Args:
      batches_from: returns the batches from a step on, as `features.encode_parts` takes them.
      batch_size: captions at a time.
      folder: where the parts of this data are kept and found again; None keeps none.

    Raises:
      UserError: features are not finite, or no image could be used.
    """
    parts = read_parts(folder)
    parts = parts[: min(gather(len(parts)))]  # as far as every process sees them
    start = len(parts) * batches_per_part
    batches = batches_from(start)
    steps = getattr(batches, "num_steps", None)
    shown = progress and jax.process_index() == 0
    done = start if steps is None else min(start, steps)  # the last part may not be full
    counted = progress_bar(steps, title, "batch", items=batches, initial=done, shown=shown)

    def on_part(number: int, part: FeatureSet) -> None:
        if folder is not None and jax.process_index() == 0:
            _write_part(part, _part_path(folder, number))
        parts.append(part)

    encode_parts(
        encoders,
        iter(counted),
        on_part,
        text_batch_size=batch_size,
        batches_per_part=batches_per_part,
        first_part=len(parts),
        skipped=lambda: getattr(batches, "skipped", {}),
    )
    if not sum(len(part) for part in parts):
        skipped = sum((Counter(part.skipped) for part in parts), Counter())
        causes = ", ".join(f"{count:,} {cause}" for cause, count in skipped.most_common())
        raise UserError(
            f"{title}: no image that could be read, so there is nothing to evaluate"
            + f" ({causes}); python -m clip_jax.data.inspect lists them" * bool(causes)
        )
    return concatenate(parts)


def encode_classes(
    encoders: Encoders,
    class_names: Sequence[str],
    templates: Sequence[str],
    batch_size: int,
    store: Path | None,
) -> Float32[np.ndarray, "M D"]:
    """Return the classes' embeddings, computed once for these weights, names and prompts."""
    path = None if store is None else class_file(store, encoders, class_names, templates)
    if path is not None and all(gather(path.exists())):
        return np.load(path, allow_pickle=False)
    class_MD = class_embeddings(
        encoders.encode_text,
        encoders.tokenizer,
        class_names,
        templates,
        batch_size=batch_size,
        context_length=encoders.context_length,
    )
    if path is not None and jax.process_index() == 0:
        _remove_outdated_classes(path)
        with atomic_write(path, shared=True) as partial, partial.open("wb") as file:
            np.save(file, class_MD)
    return class_MD


def feature_folder(
    store: Path,
    encoders: Encoders,
    shards: Sequence[Shard],
    batch_size: int,
    *,
    need_captions: bool = True,
) -> Path:
    """Return where the features of this data by these weights are kept: "DATA-WEIGHTS"."""
    # Two sets may have files of one name and size; a source that is not a file has its name alone.
    paths = [os.path.abspath(getattr(shard, "path", shard.name)) for shard in shards]
    size = encoders.image_size
    size_text = size if isinstance(size, int) else repr(size)
    sizes = (size_text, encoders.context_length, repr(encoders.preprocess), batch_size)
    which = () if need_captions else ("all images",)
    data = _short_hash(fingerprint(shards), paths, *which)
    return store / f"{data}-{_short_hash(encoders.identity, *sizes)}"


def class_file(
    store: Path, encoders: Encoders, class_names: Sequence[str], templates: Sequence[str]
) -> Path:
    """Return where the classes' embeddings by these weights and prompts are kept."""
    weights = _short_hash(encoders.identity, encoders.context_length)
    return store / f"classes-{weights}-{_short_hash(list(class_names), list(templates))}.npy"


def _short_hash(*values: Any) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=6).hexdigest()


def _remove_outdated(folder: Path | None) -> None:
    """Remove this data's features by other weights: a run's newest checkpoint is what counts."""
    if folder is not None and jax.process_index() == 0:
        for other in folder.parent.glob(f"{folder.name.split('-')[0]}-*"):
            if other != folder:
                shutil.rmtree(other)


def _remove_outdated_classes(path: Path) -> None:
    """Remove the class embeddings by other weights."""
    for other in path.parent.glob("classes-*.npy"):
        if other.name.split("-")[1] != path.name.split("-")[1]:
            other.unlink()


def read_parts(folder: Path | None) -> list[FeatureSet]:
    """Read the parts that are there without a gap, up to one that is cut off or damaged."""
    parts: list[FeatureSet] = []
    while folder is not None:
        part = _read_whole_part(_part_path(folder, len(parts)))
        if part is None:
            break  # made again
        parts.append(part)
    return parts


def _read_whole_part(path: Path) -> FeatureSet | None:
    """Return a part; None if it is not there, or damaged."""
    try:
        return _read_part(path)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


_ARRAYS = ("z_image_BD", "row_B", "label_B", "z_text_BD", "image_of_text")
_LISTS = ("keys", "captions", "skipped")


def _part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.npz"


def _write_part(part: FeatureSet, path: Path) -> None:
    rest = json.dumps({name: getattr(part, name) for name in _LISTS})
    with atomic_write(path, shared=True) as partial, partial.open("wb") as file:
        arrays = {name: getattr(part, name) for name in _ARRAYS}
        np.savez(file, rest=np.frombuffer(rest.encode(), np.uint8), **arrays)


def _read_part(path: Path) -> FeatureSet:
    # Opened here: of a damaged file, numpy leaves its own open.
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        rest = json.loads(file["rest"].tobytes())
        return FeatureSet(**{name: file[name] for name in _ARRAYS}, **rest)
