"""Compute the features of a data set part by part; every task is computed from them.

A part is some batches' features and what is known of their images.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Float32, Int32, Int64

from clip_jax.data.shards import ConcatShards, Handles, Shard
from clip_jax.errors import note
from clip_jax.evaluation.encoders import Encoders, encode_padded, unit_rows
from clip_jax.parallel.distributed import gather

T = TypeVar("T")
Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """Unit features of the images that could be read, and of their captions.

    Attributes:
      row_B: each image's position in the order of its data.
      label_B: its class, -1 where that is not known.
      keys: its name, "shard/key".
      captions: what each text says.
      image_of_text: the position in `z_image_BD` of each text's image.
      skipped: cause -> images that could not be used.
      joined: rows that are not images of their own, see `join_rows_of_one_image`.
    """

    z_image_BD: Float32[np.ndarray, "B D"]
    row_B: Int64[np.ndarray, " B"]
    label_B: Int32[np.ndarray, " B"]
    keys: list[str]
    z_text_BD: Float32[np.ndarray, "texts D"]
    captions: list[str]
    image_of_text: Int64[np.ndarray, " texts"]
    skipped: dict[str, int]
    joined: int = 0

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.row_B)


def concatenate(parts: Sequence[FeatureSet]) -> FeatureSet:
    """Join feature sets in their order."""
    starts = np.cumsum([0, *(len(part) for part in parts)])
    skipped = sum((Counter(part.skipped) for part in parts), Counter())
    return FeatureSet(
        z_image_BD=np.concatenate([part.z_image_BD for part in parts]),
        row_B=np.concatenate([part.row_B for part in parts]),
        label_B=np.concatenate([part.label_B for part in parts]),
        keys=[key for part in parts for key in part.keys],
        z_text_BD=np.concatenate([part.z_text_BD for part in parts]),
        captions=[caption for part in parts for caption in part.captions],
        image_of_text=np.concatenate(
            [part.image_of_text + start for part, start in zip(parts, starts, strict=False)]
        ),
        skipped=dict(skipped),
    )


def join_rows_of_one_image(features: FeatureSet, shards: Sequence[Shard]) -> FeatureSet:
    """Give the captions of a table's rows that hold one image to the first of these rows.

    Tables and records often have a row for each caption. Formats without `image_id` (tars, folders)
    have an image a sample; if their samples look like one image it is said.
    """
    if not any(getattr(shard, "image_id", None) for shard in shards):
        _tell_equal_images(features)
        return features
    samples = ConcatShards(shards)
    owners: dict[Hashable, int] = {}
    owner_B = np.arange(len(features))
    with Handles() as handles:
        for position, row in enumerate(features.row_B.tolist()):
            shard, i = samples.at(row)
            shared = getattr(shard, "image_id", None)
            identity = None if shared is None else shared(i, handles)
            if identity is not None:
                owner_B[position] = owners.setdefault(identity, position)
    joined = len(owner_B) - len(np.unique(owner_B))
    if joined:
        note(f"{len(features)} rows are {len(features) - joined} images with several captions")
    image_of_text = owner_B[features.image_of_text]
    return dataclasses.replace(features, image_of_text=image_of_text, joined=joined)


def _tell_equal_images(features: FeatureSet) -> None:
    """Say how many images have the very features of another, and so are scored against it."""
    equal = len(features) - len(np.unique(features.z_image_BD, axis=0))
    if equal:
        note(
            f"{equal} of {len(features)} images have the very features of another, and each counts "
            "as an image of its own; if they are one image's captions, write these as lines of one "
            ".txt"
        )


def encode_parts(
    encoders: Encoders,
    batches: Iterator[Batch],
    on_part: Callable[[int, FeatureSet], None],
    *,
    text_batch_size: int,
    batches_per_part: int,
    first_part: int = 0,
    skipped: Callable[[], Mapping[str, int]] = dict,
) -> None:
    """Encode the batches, part by part; one part is in memory at a time.

    With several processes all of them call it, and all get the whole of every part.

    Args:
      batches: this process's rows of each, as `data.loader.Batch` of evaluation; rows with `valid`
        False count nowhere.
      on_part: takes each part's number and the part.
      first_part: the number of the part that the first batch begins.
      skipped: returns cause -> rows of all batches so far that could not be used.

    Raises:
      UserError: a feature is not finite.
    """
    before: Counter[str] = Counter()
    for number, group in enumerate(_groups_of(batches, batches_per_part), first_part):
        features = [
            encode_batch(encoders, batch, step, text_batch_size)
            for step, batch in enumerate(group, number * batches_per_part)
        ]
        now = Counter(skipped())
        counts = sum((Counter(c) for c in gather(dict(now - before))), Counter())
        before = now
        on_part(
            number, dataclasses.replace(concatenate(features), skipped=dict(sorted(counts.items())))
        )


def _groups_of(items: Iterator[T], size: int) -> Iterator[Iterator[T]]:
    """Yield `size` items at a time, read only when they are needed; each group is used up first."""
    for first in items:
        yield itertools.chain([first], itertools.islice(items, size - 1))


def encode_batch(encoders: Encoders, batch: Batch, step: int, text_batch_size: int) -> FeatureSet:
    """Encode the valid rows of the global batch of a step.

    `row_B` are their positions in the order of the data. `batch` is this process's rows.

    Raises:
      UserError: a feature is not finite.
    """
    z_image_BD = np.asarray(encoders.encode_image(batch["image"]))
    batch = _gather_rows(batch)
    valid_B = np.asarray(batch["valid"], bool)
    rows = np.flatnonzero(valid_B)
    pairs = [(row, caption) for row in rows.tolist() for caption in batch["captions"][row]]
    captions = [caption for _, caption in pairs]
    tokens_BL = encoders.tokenizer(captions, encoders.context_length)
    # Bad rows are not looked at: what the encoder makes of a placeholder counts nowhere.
    z_image_BD = unit_rows(z_image_BD[rows])
    z_text_BD = np.zeros((0, z_image_BD.shape[1]), np.float32)
    if captions:
        z_text_BD = encode_padded(encoders.encode_text, tokens_BL, text_batch_size)
    return FeatureSet(
        z_image_BD,
        step * len(valid_B) + rows.astype(np.int64),
        np.asarray(batch["label"], np.int32)[rows],
        [batch["key"][row] for row in rows],
        z_text_BD,
        captions,
        np.searchsorted(rows, [row for row, _ in pairs]).astype(np.int64),
        {},
    )


def _gather_rows(batch: Batch) -> Batch:
    """Return what is known of the global batch's rows: every process's, in their order."""
    if jax.process_count() == 1:
        return batch
    local = {name: batch[name] for name in ("captions", "key")}
    local |= {name: batch[name].tolist() for name in ("valid", "label")}
    shares = gather(local)
    return {name: [row for share in shares for row in share[name]] for name in local}
