"""The batches of a run on their way to the devices, one ahead of the step that runs."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.data.caption_packing import CaptionPacking, pack_captions
from clip_jax.data.loader import Batch, Loader, bucket_length
from clip_jax.models.clip import CLIPConfig
from clip_jax.parallel import distributed
from clip_jax.parallel.mesh import BATCH_AXES, place_batch
from clip_jax.training.device_wait import DeviceWait
from clip_jax.training.distillation import split_captions
from clip_jax.training.setup import RunComponents
from clip_jax.training.signals import StopRequest
from clip_jax.training.skip_limit import SkipLimit

_PACKED = 0
"""A length that processes announce: the captions fit into their segments."""


@dataclasses.dataclass(frozen=True)
class PlacedBatch:
    """A batch on the devices, or on its way.

    Attributes:
      arrays: what the step takes.
      placed: those that come from the host; teachers' features are computed on the devices.
      keys: the keys of this process's rows.
      length: tokens of a caption, after trimming; or how captions were packed.
      stop_signals: by process, the signal that asked it to stop, or 0.
      text: the captions of this process's rows, neither trimmed nor packed.
    """

    arrays: dict[str, jax.Array]
    placed: list[jax.Array]
    keys: list[str]
    length: int | CaptionPacking
    stop_signals: np.ndarray
    text: np.ndarray


class BatchFeed:
    """Fetches batches, agrees with the other processes about each, and places it.

    Processes agree on what depends on more than the step's number: how long the captions are,
    whether one of them was asked to stop, and how much was skipped.

    Attributes:
      loader: this process's rows of each batch.

    Args:
      run: its mesh, tokenizer and model.
      loader: see above.
      count: the number of batches to take.
      limit: ends a run of which too much was skipped.
      stop_request: the signal that this process got.
      device_wait: takes the time that is spent on waiting for the loader.
    """

    def __init__(
        self,
        run: RunComponents,
        loader: Loader,
        *,
        count: int,
        limit: SkipLimit,
        stop_request: StopRequest,
        device_wait: DeviceWait,
    ) -> None:
        self.loader = loader
        self._run = run
        self._limit = limit
        self._stop_request = stop_request
        self._device_wait = device_wait
        self._step = loader.step
        self._batches = announced(loader, count, self._announce)

    def place_next(self) -> PlacedBatch | None:
        """Start moving the next batch to the devices; None after the last.

        Raises:
          UserError: too much was skipped by now.
        """
        with self._device_wait:
            fetched = next(self._batches, None)
        if fetched is None:
            return None
        batch, answers = fetched
        self._limit.check(answers[:, 2:])
        length, packing = int(answers[:, 0].max()), self._run.caption_packing
        if packing is not None and length == _PACKED:
            text = batch["packed"]
        else:
            text, packing = {"text": batch["text"][:, :length]}, None
            if "negative" in batch:
                text["negative"] = batch["negative"][:, :length]
        signals = answers[:, 1]
        arrays = place_batch(device_arrays(batch) | text, self._run.mesh)
        placed = list(arrays.values())
        if self._run.distiller is not None:
            arrays |= self._run.distiller.features(batch, self._step)
        self._step += 1
        return PlacedBatch(arrays, placed, batch["key"], packing or length, signals, batch["text"])

    def _announce(self, batch: Batch) -> distributed.Announcement:
        """Tell all processes (caption length, stop signal, skipped rows, rows) of a batch."""
        if self._run.distiller is not None:
            split_captions(batch, self._run.model.config.text.context_length)
        length = self._trim(batch)
        rows = sum(key != "" for key in batch["key"])
        skipped = rows - int(batch["valid"].sum())
        return distributed.Announcement((length, self._stop_request.signal, skipped, rows))

    def _trim(self, batch: Batch) -> int:
        """Return the length that a batch's captions can be cut to; 0 if they come packed."""
        text, eot_id = batch["text"], self._run.tokenizer.eot_id
        if not self._run.model.config.text.supports_trimming:
            return text.shape[1]
        packing = self._run.caption_packing
        if packing is None:
            negative = batch.get("negative")
            every = text if negative is None else np.concatenate([text, negative])
            return bucket_length(every, eot_id)
        packed = pack_captions(text, eot_id, packing)
        if packed is None:
            return text.shape[1]  # the one other shape that is compiled
        batch["packed"] = packed
        return _PACKED


def announced(
    loader: Iterator[Batch], count: int, announce: Callable[[Batch], distributed.Announcement]
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield `count` batches, each with what every process announced of it.

    With several processes a batch is fetched and announced before the step of the one before it
    is dispatched, so that the answer is there when its own step is.
    """
    ahead = 0 if distributed.process_count() == 1 else 1
    waiting: deque[tuple[Batch, distributed.Announcement]] = deque()
    for fetched in range(count + ahead):
        if fetched < count:
            batch = next(loader)
            waiting.append((batch, announce(batch)))
        if fetched >= ahead:
            batch, announcement = waiting.popleft()
            yield batch, announcement.result()


def trimmed_batch_shapes(
    mesh: Mesh, config: CLIPConfig, batch_size: int, length: int, *, negatives: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a placed global batch whose captions are trimmed to `length`.

    `negatives`: the batch has texts that are negatives alone.
    """
    sharding, size = NamedSharding(mesh, P(BATCH_AXES)), config.vision.image_size
    arrays: dict[str, tuple[tuple[int, ...], Any]] = {
        "image": ((batch_size, size, size, 3), np.uint8),
        "text": ((batch_size, length), np.int32),
        "caption_id": ((batch_size,), np.uint32),
        "valid": ((batch_size,), np.bool_),
    }
    if negatives:
        others = {"negative": "text", "negative_id": "caption_id", "negative_valid": "valid"}
        arrays |= {name: arrays[other] for name, other in others.items()}
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in arrays.items()
    }


def packed_shapes(
    shapes: dict[str, jax.ShapeDtypeStruct], packing: CaptionPacking
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a placed batch whose captions are packed, from those of a plain one.

    The second program of such a run is the plain one's, with captions of the full length.
    """
    shapes = dict(shapes)
    text = shapes.pop("text")
    segments = text.shape[0] // packing.captions * packing.segments
    sizes = {
        "text_tokens": (segments, packing.segment_rows),
        "text_positions": (segments, packing.segment_rows),
        "text_end": text.shape[:1],
    }
    return shapes | {
        name: jax.ShapeDtypeStruct(size, text.dtype, sharding=text.sharding)
        for name, size in sizes.items()
    }


def device_arrays(batch: Batch) -> dict[str, np.ndarray]:
    """Return what of a batch travels to the devices, besides the captions."""
    arrays = {
        "image": batch["image"],
        "caption_id": batch["caption_id"],
        "valid": batch["valid"],
    }
    if "negative" in batch:
        arrays["negative_id"] = batch["negative_id"]
        arrays["negative_valid"] = batch["negative_valid"]
    return arrays
