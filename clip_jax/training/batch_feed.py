"""The batches of a run on their way to the devices, one ahead of the step that runs."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.data.loader import Batch, Loader, bucket_length
from clip_jax.models.clip import CLIPConfig
from clip_jax.parallel import distributed
from clip_jax.parallel.mesh import BATCH_AXES, place_batch
from clip_jax.training.metrics import DataWait
from clip_jax.training.setup import RunComponents
from clip_jax.training.signals import StopRequest
from clip_jax.training.skip_limit import SkipLimit


@dataclasses.dataclass(frozen=True)
class PlacedBatch:
    """A batch on the devices, or on its way.

    Attributes:
      arrays: what the step takes.
      keys: the keys of this process's rows.
      length: tokens of a caption, after trimming.
      stop_signals: by process, the signal that asked it to stop, or 0.
    """

    arrays: dict[str, jax.Array]
    keys: list[str]
    length: int
    stop_signals: np.ndarray


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
      data_wait: takes the time that is spent on waiting for the loader.
    """

    def __init__(
        self,
        run: RunComponents,
        loader: Loader,
        *,
        count: int,
        limit: SkipLimit,
        stop_request: StopRequest,
        data_wait: DataWait,
    ) -> None:
        self.loader = loader
        self._run = run
        self._limit = limit
        self._stop_request = stop_request
        self._data_wait = data_wait
        self._batches = announced(loader, count, self._announce)

    def place_next(self) -> PlacedBatch | None:
        """Start moving the next batch to the devices; None after the last.

        Raises:
          UserError: too much was skipped by now.
        """
        with self._data_wait:
            fetched = next(self._batches, None)
        if fetched is None:
            return None
        batch, answers = fetched
        self._limit.check(answers[:, 2:])
        length = int(answers[:, 0].max())
        batch["text"] = batch["text"][:, :length]
        arrays = place_batch(device_arrays(batch), self._run.mesh)
        return PlacedBatch(arrays, batch["key"], length, stop_signals=answers[:, 1])

    def _announce(self, batch: Batch) -> distributed.Announcement:
        """Tell all processes (caption length, stop signal, skipped rows, rows) of a batch."""
        text = batch["text"]
        trims = self._run.model.config.text.supports_trimming
        length = bucket_length(text, self._run.tokenizer.eot_id) if trims else text.shape[1]
        rows = sum(key != "" for key in batch["key"])
        skipped = rows - int(batch["valid"].sum())
        return distributed.Announcement((length, self._stop_request.signal, skipped, rows))


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
    mesh: Mesh, config: CLIPConfig, batch_size: int, length: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a placed global batch whose captions are trimmed to `length`."""
    sharding, size = NamedSharding(mesh, P(BATCH_AXES)), config.vision.image_size
    arrays: dict[str, tuple[tuple[int, ...], Any]] = {
        "image": ((batch_size, size, size, 3), np.uint8),
        "text": ((batch_size, length), np.int32),
        "caption_id": ((batch_size,), np.uint32),
        "valid": ((batch_size,), np.bool_),
    }
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in arrays.items()
    }


def device_arrays(batch: Batch) -> dict[str, np.ndarray]:
    """Return what of a batch travels to the devices."""
    return {
        "image": batch["image"],
        "text": batch["text"],
        "caption_id": batch["caption_id"],
        "valid": batch["valid"],
    }
