"""A data set's features, part by part: what every task is computed from.

A part is some batches' features and what is known of their images. Parts are stored as they are
made, so an evaluation that was killed goes on at its last part, and one with other tasks or
prompts encodes no image again.
"""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float32, Int32, Int64

from clip_jax.errors import UserError
from clip_jax.evaluation.encoders import EncodeImage, EncodeText, encode_padded, unit_rows
from clip_jax.files import atomic_write
from clip_jax.progress_bar import progress_bar
from clip_jax.typing import Tokenizer

T = TypeVar("T")
Batches = Iterable[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """Unit features of the images that could be read, and of their captions.

    Attributes:
      row_B: each image's place in the order of its data.
      label_B: its class, -1 where that is not known.
      keys: its name, "shard/key".
      captions: what each text says, as a string or an id.
      image_of_text: the place in `z_image_BD` of each text's image.
      skipped: cause -> images that could not be used.
    """

    z_image_BD: Float32[np.ndarray, "B D"]
    row_B: Int64[np.ndarray, " B"]
    label_B: Int32[np.ndarray, " B"]
    keys: list[str]
    z_text_BD: Float32[np.ndarray, "texts D"]
    captions: list[Hashable]
    image_of_text: Int64[np.ndarray, " texts"]
    skipped: dict[str, int]

    def __len__(self) -> int:
        return len(self.row_B)


def join(parts: Sequence[FeatureSet]) -> FeatureSet:
    """One set of several, in their order."""
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


def collect(
    encode_image: EncodeImage,
    encode_text: EncodeText,
    tokenizer: Tokenizer,
    batches_from: Callable[[int], Batches],
    *,
    context_length: int,
    text_batch_size: int,
    batches_per_part: int = 32,
    folder: Path | None = None,
    title: str = "",
    progress: bool = True,
) -> FeatureSet:
    """Encode every batch; with several processes all call it and all get the whole.

    Args:
      batches_from: the batches from a step on: this process's rows of each, as
        `data.loader.Batch`; rows with `valid` False count nowhere.
      folder: where parts are kept and found again; None keeps none.

    Raises UserError when features are not finite, or when no image could be used.
    """
    parts = stored_parts(folder)
    parts = parts[: min(gather_json(len(parts)))]  # as far as every process sees them
    start = len(parts) * batches_per_part
    batches = batches_from(start)
    steps = getattr(batches, "num_steps", None)
    shown = progress and jax.process_index() == 0
    done = start if steps is None else min(start, steps)  # the last part may not be full
    counted = progress_bar(steps, title, "batch", items=batches, initial=done, shown=shown)

    def keep(number: int, part: FeatureSet) -> None:
        if folder is not None and jax.process_index() == 0:
            _store(part, folder / f"part-{number:05d}.npz")
        parts.append(part)

    encode_parts(
        encode_image,
        encode_text,
        tokenizer,
        iter(counted),
        keep,
        context_length=context_length,
        text_batch_size=text_batch_size,
        batches_per_part=batches_per_part,
        first_part=len(parts),
        skipped=lambda: getattr(batches, "skipped", {}),
    )
    if not sum(len(part) for part in parts):
        raise UserError(f"{title}: no image that could be read, so there is nothing to evaluate")
    return join(parts)


def encode_parts(
    encode_image: EncodeImage,
    encode_text: EncodeText,
    tokenizer: Tokenizer,
    batches: Iterator[Mapping[str, Any]],
    keep: Callable[[int, FeatureSet], None],
    *,
    context_length: int,
    text_batch_size: int,
    batches_per_part: int,
    first_part: int = 0,
    skipped: Callable[[], Mapping[str, int]] = dict,
) -> None:
    """The features of the batches, part by part; one part is in memory at a time.

    Args:
      keep: takes each part and its number.
      first_part: the number of the part that the first batch begins.
      skipped: cause -> rows of all batches so far that could not be used.
    """
    before: Counter[str] = Counter()
    for number, group in enumerate(_groups_of(batches, batches_per_part), first_part):
        made = []
        for step, batch in enumerate(group, number * batches_per_part):
            z_image_BD = np.asarray(encode_image(batch["image"]))
            known = _of_all_processes(batch)
            texts = _texts(known, tokenizer, context_length)
            made.append(_features(z_image_BD, known, texts, encode_text, text_batch_size, step))
        now = Counter(skipped())
        counts = sum((Counter(c) for c in gather_json(dict(now - before))), Counter())
        before = now
        keep(number, dataclasses.replace(join(made), skipped=dict(counts)))


def _features(
    z_image_BD: np.ndarray,
    batch: Mapping[str, Any],
    texts: tuple[np.ndarray, list[Any], list[int]],
    encode_text: EncodeText,
    text_batch_size: int,
    step: int,
) -> FeatureSet:
    """What a batch's rows that are ok come to, each at its place in the order of the data."""
    valid_B = np.asarray(batch["valid"], bool)
    rows = np.flatnonzero(valid_B)
    # Bad rows are not looked at: what the encoder makes of a placeholder counts nowhere.
    z_image_BD = unit_rows(z_image_BD[rows])
    tokens_BL, captions, row_of_text = texts
    z_text_BD = np.zeros((0, z_image_BD.shape[1]), np.float32)
    if captions:
        z_text_BD = encode_padded(encode_text, tokens_BL, text_batch_size)
    label_B = np.asarray(batch.get("label", np.full(len(valid_B), -1)), np.int32)
    keys = batch.get("key", [""] * len(valid_B))
    return FeatureSet(
        z_image_BD,
        step * len(valid_B) + rows.astype(np.int64),
        label_B[rows],
        [keys[row] for row in rows],
        z_text_BD,
        captions,
        np.searchsorted(rows, row_of_text).astype(np.int64),
        {},
    )


def _groups_of(items: Iterator[T], size: int) -> Iterator[Iterator[T]]:
    """So many items at a time, read only when they are asked for; each group is used up first."""
    for first in items:
        yield itertools.chain([first], itertools.islice(items, size - 1))


def _texts(
    batch: Mapping[str, Any], tokenizer: Tokenizer, context_length: int
) -> tuple[np.ndarray, list[Any], list[int]]:
    """Tokens of the usable rows' texts, what they say, and the row of each."""
    rows = np.flatnonzero(batch["valid"]).tolist()
    if "captions" in batch:
        pairs = [(row, text) for row in rows for text in batch["captions"][row]]
        captions = [text for _, text in pairs]
        return tokenizer(captions, context_length), captions, [row for row, _ in pairs]
    if "text" in batch:
        return batch["text"][rows], batch["caption_id"][rows].tolist(), rows
    return np.empty((0, context_length), np.int32), [], []


def _of_all_processes(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is known of the global batch's rows: every process's, in their order."""
    if jax.process_count() == 1:
        return batch
    own = {name: batch[name] for name in ("captions", "key")}
    own |= {name: batch[name].tolist() for name in ("valid", "label")}
    shares = gather_json(own)
    return {name: [row for share in shares for row in share[name]] for name in own}


def gather_json(value: Any) -> list[Any]:
    """Every process's value, in the order of the processes, on all of them."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([len(data)]))).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, sizes, strict=True)]


def stored_parts(folder: Path | None) -> list[FeatureSet]:
    """The parts that are there without a gap."""
    if folder is None:
        return []
    found: list[FeatureSet] = []
    while (path := folder / f"part-{len(found):05d}.npz").exists():
        try:
            found.append(_read(path))
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            break  # cut off or damaged: made again
    return found


_ARRAYS = ("z_image_BD", "row_B", "label_B", "z_text_BD", "image_of_text")
_LISTS = ("keys", "captions", "skipped")


def _store(part: FeatureSet, path: Path) -> None:
    rest = json.dumps({name: getattr(part, name) for name in _LISTS})
    with atomic_write(path) as partial, partial.open("wb") as file:
        arrays = {name: getattr(part, name) for name in _ARRAYS}
        np.savez(file, rest=np.frombuffer(rest.encode(), np.uint8), **arrays)


def _read(path: Path) -> FeatureSet:
    # Opened here: of a damaged file, numpy leaves its own open.
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        rest = json.loads(file["rest"].tobytes())
        return FeatureSet(**{name: file[name] for name in _ARRAYS}, **rest)
