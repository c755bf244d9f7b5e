"""Store the teachers' features of a run's samples, epoch by epoch, for `config.distill.features`.

Files appear whole and a file is the same whoever makes it, and when: a process that was killed goes
on with the files that are not there, and several share them out.
"""

import dataclasses
import itertools
from collections import Counter
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
from clip_jax.training.distillation import TeacherInfo, image_rows, split_captions, text_rows
from clip_jax.training.setup import build_run, open_data, sized_images, steps_of_run
from clip_jax.training.stored_features import (
    FeatureFolder,
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
      infos: the teachers.
      epochs: those that were asked for.
      samples: of an epoch.
      made, missing: files that this call made, and files of these epochs that are not there.
      skipped: samples that could not be read, by cause, a sample once an epoch.
    """

    folder: Path
    infos: tuple[TeacherInfo, ...]
    epochs: int
    samples: int
    made: int
    missing: int
    skipped: Counter[str]


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
    if not config.distill.teachers:
        raise UserError("config.distill.teachers is empty; name the models whose features to store")
    if jax.process_count() > 1:
        raise UserError(
            "the devices of this machine have started together with those of others, as on a TPU "
            "pod, and reinforce works with a machine's own; start it on a single one"
        )
    out = Path(out)
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    teachers = load_teachers(config.distill.teachers, mesh, dtype=config.distill.dtype)
    data = open_data(config, str(out))
    values, contents = features_of_data(config, sized_images(config), data)
    folder = begin_features(out, values, contents, teachers.infos)
    epochs = epochs or epochs_of_steps(config, data, steps_of_run(config, folder.samples))
    places = [(epoch, part) for epoch in range(epochs) for part in range(folder.parts)]
    mine = set(places[process_index::process_count])
    missing = [place for place in folder.missing(epochs) if place in mine]
    rows = BLOCK_ROWS * batch_shards(mesh)
    rows *= max(1, BATCH_BLOCKS * BLOCK_ROWS // rows)
    _make_files(config, data, teachers, folder, missing, rows, len(mine), progress)
    return Reinforced(
        out,
        teachers.infos,
        epochs,
        folder.samples,
        len(missing),
        len(folder.missing(epochs)),
        Counter(data.log.counts),
    )


def _make_files(
    config: Config,
    data: TrainingData,
    teachers: LiveTeachers,
    folder: FeatureFolder,
    missing: list[tuple[int, int]],
    rows: int,
    files: int,
    progress: bool,
) -> None:
    """Make files, one after another, with one loader."""
    run = build_run(config, 1)
    context_length = run.model.config.text.context_length
    tokenizer, length = teachers.tokenizer(run.tokenizer, context_length)
    batches = {place: batches_of_part(folder, *place, rows) for place in missing}
    done = (files - len(missing)) * folder.samples // folder.parts
    total = done + sum(stop - start for each in batches.values() for _, start, stop in each)
    with (
        make_listed_loader(
            data,
            config.data,
            tokenizer,
            shape=SampleShape(run.model.config.vision.image_size, length),
            seed=config.seed,
            batch_size=rows,
            batches=list(itertools.chain(*batches.values())),
        ) as loader,
        progress_bar(total, "reinforce", " samples", initial=done, shown=progress) as bar,
    ):
        for place, each in batches.items():
            parts = []
            for _, start, stop in each:
                parts.append(_encode(loader, teachers, context_length)[: stop - start])
                bar.update(stop - start)
            folder.write_part(*place, np.concatenate(parts))


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
    names = [name(i) for i in range(len(teachers.infos)) for name in (image_rows, text_rows)]
    rows_BW = np.concatenate([arrays[name] for name in names], axis=1)
    return np.where(batch["valid"][:, None], rows_BW, 0)
