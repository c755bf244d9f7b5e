"""Store the teachers' features of a run's samples, epoch by epoch, for `config.distill.features`.

Files appear whole and a file is the same whoever makes it, and when: a process that was killed goes
on with the files that are not there, and several share them out.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from clip_jax.data.dataset import TrainingData
from clip_jax.data.loader import Loader, make_listed_loader
from clip_jax.data.sample_reader import SampleShape
from clip_jax.errors import UserError
from clip_jax.parallel.mesh import batch_shards, make_mesh
from clip_jax.progress_bar import progress_bar
from clip_jax.sections import Config
from clip_jax.training.distillation import feature_names, split_captions
from clip_jax.training.setup import build_run, open_data, sized_images, steps_of_run
from clip_jax.training.stored_features import (
    FeatureFolder,
    FeatureInfo,
    begin_features,
    epochs_of_steps,
    features_of_data,
)
from clip_jax.training.teachers import BLOCK_ROWS, LiveTeachers, load_teachers

BATCH_BLOCKS = 8
"""Blocks of `BLOCK_ROWS` rows in a batch, at least."""


@dataclasses.dataclass(frozen=True)
class Reinforced:
    """The outcome of one call.

    Attributes:
      folder: where the features lie.
      epochs: those that were asked for.
      made: files that this call made.
      skipped: samples of these that could not be read, by cause.
    """

    folder: FeatureFolder
    epochs: int
    made: int
    skipped: Counter[str]

    @property
    def missing(self) -> int:
        """Return how many files of these epochs are not there."""
        return len(self.folder.missing(self.epochs))


@dataclasses.dataclass(frozen=True, eq=False)
class Reinforcement:
    """What makes files of features: a run's data, and its teachers.

    Attributes:
      config: the run.
      data: its samples.
      teachers: on this process's devices.
      info: what the features are made of.
      rows: of a batch.
    """

    config: Config
    data: TrainingData
    teachers: LiveTeachers
    info: FeatureInfo
    rows: int

    def epochs(self) -> int:
        """Return how many epochs the run begins."""
        samples = self.info.values["number of samples"]
        return epochs_of_steps(self.config, self.data, steps_of_run(self.config, samples))

    def make(
        self,
        folder: FeatureFolder,
        places: Sequence[tuple[int, int]],
        on_samples: Callable[[int], object] = lambda count: None,
    ) -> Counter[str]:
        """Make files, (epoch, part) each, with one loader; return what could not be read."""
        run = build_run(self.config, 1)
        context_length = run.model.config.text.context_length
        tokenizer, length = self.teachers.tokenizer(run.tokenizer, context_length)
        batches = {place: batches_of_part(folder, *place, self.rows) for place in places}
        with make_listed_loader(
            self.data,
            self.config.data,
            tokenizer,
            shape=SampleShape(run.model.config.vision.image_size, length),
            seed=self.config.seed,
            batch_size=self.rows,
            batches=list(itertools.chain(*batches.values())),
        ) as loader:
            before = Counter(loader.skipped)
            for place, each in batches.items():
                parts = []
                for _, start, stop in each:
                    parts.append(_encode(loader, self.teachers, context_length)[: stop - start])
                    on_samples(stop - start)
                folder.write_part(*place, np.concatenate(parts))
            return Counter(loader.skipped) - before


def open_reinforcement(config: Config, workdir: str) -> Reinforcement:
    """Open the data and the teachers of a run.

    Args:
      config: the run.
      workdir: where what is skipped is listed.

    Raises:
      UserError: a teacher or the data cannot be read, or this process's devices are part of a
        larger system.
    """
    if not config.distill.teachers:
        raise UserError("config.distill.teachers is empty; name the models whose features to store")
    if jax.process_count() > 1:
        raise UserError(
            "the devices of this machine have started together with those of others, as on a TPU "
            "pod, and reinforce works with a machine's own; start it on a single one"
        )
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    teachers = load_teachers(config.distill.teachers, mesh, dtype=config.distill.dtype)
    data = open_data(config, workdir)
    values, contents = features_of_data(config, sized_images(config), data)
    rows = BLOCK_ROWS * batch_shards(mesh)
    rows *= max(1, BATCH_BLOCKS * BLOCK_ROWS // rows)
    return Reinforcement(
        config, data, teachers, FeatureInfo(values, contents, teachers.infos), rows
    )


def file_sizes(folder: FeatureFolder, epochs: int) -> dict[tuple[int, int], int]:
    """Return the samples of each file of so many epochs, by (epoch, part)."""
    ranges = {part: folder.part_range(part) for part in range(folder.parts)}
    return {
        (epoch, part): stop - first
        for epoch in range(epochs)
        for part, (first, stop) in ranges.items()
    }


def reinforce(
    config: Config,
    out: str | Path,
    *,
    epochs: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    progress: bool = True,
) -> Reinforced:
    """Make the files of this process that are not there yet.

    Args:
      config: the run, with its teachers.
      out: the folder.
      epochs: how many are stored; 0 is as many as the run begins.
      process_index, process_count: this process and how many share the files out.
      progress: show how far it has come.

    Raises:
      UserError: a teacher or the data cannot be read, or the folder holds something else.
    """
    out = Path(out)
    opened = open_reinforcement(config, str(out))
    begin_features(out, opened.info)
    folder, epochs = opened.info.folder(out), epochs or opened.epochs()
    sizes = file_sizes(folder, epochs)
    mine = dict(list(sizes.items())[process_index::process_count])
    missing = [place for place in folder.missing(epochs) if place in mine]
    total = sum(mine.values())
    done = total - sum(mine[place] for place in missing)
    with progress_bar(total, "reinforce", " samples", initial=done, shown=progress) as bar:
        skipped = opened.make(folder, missing, bar.update)
    return Reinforced(folder, epochs, len(missing), skipped)


def batches_of_part(
    folder: FeatureFolder, epoch: int, part: int, rows: int
) -> list[tuple[int, int, int]]:
    """Return the batches of a file, as `make_listed_loader` takes them."""
    first, last = folder.part_range(part)
    return [(epoch, start, min(start + rows, last)) for start in range(first, last, rows)]


def _encode(loader: Loader, teachers: LiveTeachers, context_length: int) -> np.ndarray:
    """Return the features of the next batch as they are stored."""
    batch = next(loader)
    split_captions(batch, context_length)
    arrays = jax.device_get(teachers.features(batch, 0))
    rows_BW = np.concatenate([arrays[name] for name in feature_names(len(teachers.infos))], axis=1)
    return np.where(batch["valid"][:, None], rows_BW, 0)
