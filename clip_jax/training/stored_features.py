"""Teachers' features of training samples, stored by epoch and sample beside the data.

A folder holds `features.json`, which says of what teachers, data and crops they are, and for each
epoch files of `PART_ROWS` samples in the order of the data: float16, of each teacher its image's
and its text's features side by side. A row of zeros is a sample that could not be read.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clip_jax.data.dataset import TrainingData, contents_fingerprint
from clip_jax.data.loader import Batch, make_order
from clip_jax.data.order import MIXTURE_BLOCK, WHOLE_BATCH, BatchOrder, BatchPart, Streams
from clip_jax.data.sources import fingerprint
from clip_jax.errors import UserError, located
from clip_jax.files import atomic_write, claim_folder
from clip_jax.parallel.mesh import place_batch
from clip_jax.sections import Config, DataSection, all_values
from clip_jax.training.bucket_copy import local_copy
from clip_jax.training.distillation import FEATURE_DTYPE, TeacherInfo, feature_names
from clip_jax.typing import Tokenizer

INFO_FILENAME = "features.json"
PART_ROWS = 8192
"""Samples of a file."""
COMMAND = "python -m clip_jax.data.reinforce"
IRRELEVANT = (
    *("weights", "streams", "window", "repeat"),
    *("color_jitter", "random_erasing", "erasing_mode", "negatives"),
)
"""Fields of `DataSection` that decide when a sample comes, or what its step draws for it: a
sample's crop and caption in an epoch do not depend on them."""


@dataclasses.dataclass(frozen=True)
class FeatureFolder:
    """A folder of features, and the layout of its files.

    Attributes:
      path: the folder.
      samples: of an epoch.
      infos: the teachers.
    """

    path: Path
    samples: int
    infos: tuple[TeacherInfo, ...]

    @property
    def parts(self) -> int:
        """Return the files of an epoch."""
        return math.ceil(self.samples / PART_ROWS)

    @property
    def width(self) -> int:
        """Return the numbers of a sample."""
        return 2 * sum(info.embed_dim for info in self.infos)

    def part_range(self, part: int) -> tuple[int, int]:
        """Return the first sample of a file, and the one behind its last."""
        return part * PART_ROWS, min(self.samples, (part + 1) * PART_ROWS)

    def part_path(self, epoch: int, part: int) -> Path:
        """Return a file of an epoch."""
        return self.path / f"epoch-{epoch:05}" / f"part-{part:05}.npy"

    def missing(self, epochs: int) -> list[tuple[int, int]]:
        """Return (epoch, part) of each file that is not there."""
        wanted = ((epoch, part) for epoch in range(epochs) for part in range(self.parts))
        return [place for place in wanted if not self.part_path(*place).exists()]

    def write_part(self, epoch: int, part: int, rows: np.ndarray) -> None:
        """Write a file, whole or not at all."""
        with atomic_write(self.part_path(epoch, part)) as partial, partial.open("wb") as file:
            np.save(file, rows.astype(FEATURE_DTYPE))

    def open_part(self, epoch: int, part: int) -> np.ndarray:
        """Map a file into memory.

        Raises:
          UserError: it is not there, or not what it must be.
        """
        path, (first, stop) = self.part_path(epoch, part), self.part_range(part)
        try:
            rows = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is damaged"
            raise UserError(
                f"{path} cannot be read ({reason}); remove it and run {COMMAND}"
            ) from None
        if rows.shape != (stop - first, self.width) or rows.dtype != FEATURE_DTYPE:
            raise UserError(f"{path} is damaged; remove it and run {COMMAND} again")
        return rows


def features_of_data(
    config: Config, image_size: int, data: TrainingData
) -> tuple[dict[str, Any], str | None]:
    """Return what the features of a run's crops and captions depend on beside the teachers.

    The second value is the digest of the shards' contents; None where it is not known.
    """
    fields = {
        f"config.data.{field.name}": getattr(config.data, field.name)
        for field in dataclasses.fields(DataSection)
        if not field.metadata.get("may_change") and field.name not in IRRELEVANT
    }
    shards = data.shards
    values = {
        "config.seed": config.seed,
        "config.model.image_size": image_size,
        "number of samples": sum(len(shard) for shard in shards),
        "data": fingerprint(shards),
        "rows of a file": PART_ROWS,
    }
    return values | fields, contents_fingerprint(shards)


@dataclasses.dataclass(frozen=True)
class FeatureInfo:
    """What a folder's features are made of.

    Attributes:
      values, contents: as `features_of_data` returns them.
      infos: the teachers.
    """

    values: dict[str, Any]
    contents: str | None
    infos: tuple[TeacherInfo, ...]

    def folder(self, path: Path) -> FeatureFolder:
        """Return the folder of these features."""
        return FeatureFolder(path, self.values["number of samples"], self.infos)


def begin_features(path: Path, info: FeatureInfo, *, write: bool = True) -> bool:
    """Begin a folder, or return True where one of the same teachers, data and crops is there.

    `write` False leaves a new folder as it is.

    Raises:
      UserError: the folder holds something else, or cannot be written.
    """
    described = {
        **info.values,
        "teachers": [teacher.identity for teacher in info.infos],
        "teacher_infos": [dataclasses.asdict(teacher) for teacher in info.infos],
        "contents": info.contents,
    }
    is_begun = claim_folder(
        path,
        described,
        name=INFO_FILENAME,
        write=write,
        may_differ=("teacher_infos", "contents"),
        defaults=_defaults(),
        foreign=("config.json", "checkpoints", "*.tar"),
    )
    if is_begun:
        _check_contents(path, _read_info(path).get("contents"), info.contents)
    return is_begun


def open_features(
    path: Path,
    values: Mapping[str, Any],
    contents: str | None,
    identities: Sequence[str] | None = None,
) -> FeatureFolder:
    """Open a folder of the same data and crops, and of the same teachers where those are given.

    Raises:
      UserError: the folder holds none, or others.
    """
    if not (path / INFO_FILENAME).is_file():
        raise UserError(f"config.distill.features {path} holds no {INFO_FILENAME}; run {COMMAND}")
    info = _defaults() | _read_info(path)
    wanted = {**values} | ({} if identities is None else {"teachers": list(identities)})
    for key, value in _as_read(wanted).items():
        if info.get(key) != value:
            raise UserError(
                f"config.distill.features {path} was made with another {key} "
                f"({info.get(key)!s:.60}, now {value!s:.60}); make others with {COMMAND} --out"
            )
    _check_contents(path, info.get("contents"), contents)
    try:
        infos = tuple(TeacherInfo(**values) for values in info["teacher_infos"])
    except (KeyError, TypeError):
        raise UserError(f"{path / INFO_FILENAME} is damaged; run {COMMAND} --out") from None
    return FeatureFolder(path, values["number of samples"], infos)


def _as_read(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as JSON gives them back: tuples become lists."""
    return json.loads(json.dumps(values))


def _defaults() -> dict[str, Any]:
    """Return the fields at their defaults: a folder of an earlier version may lack some."""
    return _as_read(all_values(Config()))


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads((path / INFO_FILENAME).read_text(encoding="utf-8"))
        if isinstance(info, dict):
            return info
    except (OSError, ValueError):
        pass
    raise UserError(f"{path / INFO_FILENAME} cannot be read; make the features with {COMMAND}")


def _check_contents(path: Path, stored: str | None, contents: str | None) -> None:
    if stored is not None and contents is not None and stored != contents:
        raise UserError(f"the shards hold other samples than those whose features are in {path}")


def epochs_of_steps(config: Config, data: TrainingData, steps: int) -> int:
    """Return how many epochs of its data a run of so many steps begins."""
    order, _ = make_order(data.sources, config.data, config.seed)
    if not config.data.repeat:
        return 1
    return 1 + max(_last_epoch(order, stream, config, steps) for stream in range(order.num_streams))


def _last_epoch(order: Streams, stream: int, config: Config, steps: int) -> int:
    positions = steps * config.train.batch_size // config.data.streams
    # Of a mixture each source has epochs of its own, and a place in every block.
    count = min(positions, 2 * MIXTURE_BLOCK)
    return int(order.samples_at(stream, positions - count, count)[1].max())


class StoredFeatures:
    """Reads the teachers' features; see `distillation.Distiller`.

    A sample without features is not valid in its batch.

    Args:
      folder: holds them.
      config, data: of the run.
      mesh, part: where the rows go, and this process's part of a batch.
    """

    def __init__(
        self,
        folder: FeatureFolder,
        config: Config,
        data: TrainingData,
        mesh: Mesh,
        part: BatchPart = WHOLE_BATCH,
    ) -> None:
        self.infos = folder.infos
        self._folder = folder
        self._mesh = mesh
        order, lengths = make_order(data.sources, config.data, config.seed)
        self._rows = BatchOrder(
            order,
            batch_size=config.train.batch_size,
            part=part,
            lengths=None if config.data.repeat else lengths,
        )
        self._open = functools.lru_cache(maxsize=1024)(folder.open_part)

    def tokenizer(self, student: Tokenizer, context_length: int) -> tuple[Tokenizer, int]:
        """Return the student's tokenizer: no teacher reads."""
        return student, context_length

    def features(self, batch: Batch, step: int) -> dict[str, jax.Array]:
        """Return the stored features of this process's rows of a batch."""
        rows_BW = self.read(*self._rows.rows_at(step, 0, self._rows.rows))
        valid_B = batch["valid"] & rows_BW.any(axis=1)
        widths = [info.embed_dim for info in self.infos for _ in range(2)]
        names = feature_names(len(self.infos))
        arrays = np.split(rows_BW, np.cumsum(widths)[:-1], axis=1)
        return place_batch(dict(zip(names, arrays, strict=True)) | {"valid": valid_B}, self._mesh)

    def read(self, ids: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Return the numbers of samples in their epochs; zeros for an id of -1."""
        rows = np.zeros((len(ids), self._folder.width), FEATURE_DTYPE)
        parts = ids // PART_ROWS
        for epoch, part in sorted({*zip(epochs.tolist(), parts.tolist(), strict=True)}):
            if part < 0:
                continue
            here = np.flatnonzero((epochs == epoch) & (parts == part))
            rows[here] = self._open(epoch, part)[ids[here] - part * PART_ROWS]
        return rows


def open_stored(
    config: Config,
    steps: int,
    data: TrainingData,
    *,
    image_size: int,
    identities: Sequence[str] | None,
    mesh: Mesh,
    part: BatchPart,
) -> StoredFeatures:
    """Open the features of a run of so many steps.

    Args:
      image_size: the side of its crops.
      identities: of its teachers, where it names them.
      mesh, part: as `StoredFeatures` takes them.

    Raises:
      UserError: they are of something else, or not of all epochs.
    """
    with located("config.distill.features"):
        path = Path(local_copy(config.distill.features))
    values, contents = features_of_data(config, image_size, data)
    folder = open_features(path, values, contents, identities)
    epochs = epochs_of_steps(config, data, steps)
    missing = folder.missing(epochs)
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} of {epochs * folder.parts} files, the first of epoch "
            f"{missing[0][0]}, and {steps} steps begin {epochs} epochs; run {COMMAND} again"
        )
    return StoredFeatures(folder, config, data, mesh, part)
