"""Encoding for evaluations on the workers of an executor."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from clip_jax.evaluation.feature_store import FeatureJob
from clip_jax.executors.parts import Executor, PartMaker
from clip_jax.executors.pool import WorkerPool
from clip_jax.tools.absolute_paths import absolute_checkpoint


def encode_elsewhere(
    executor: Executor, checkpoint: Mapping[str, Any]
) -> Callable[[FeatureJob], None]:
    """Return what has an evaluation's features encoded by an executor's workers.

    Args:
      checkpoint: the arguments of `api.load_encoders`.
    """

    def encode(job: FeatureJob) -> None:
        missing = job.missing
        if not missing:
            return
        job.folder.mkdir(parents=True, exist_ok=True)
        options = {
            "checkpoint": absolute_checkpoint(checkpoint),
            "job": job,
            "current_folder": os.getcwd(),
        }
        name = f"{__name__}:open_encoder"
        with WorkerPool(executor, name, options, uses_devices=True) as pool:
            pool.run(dict(enumerate(job.parts.sizes)), missing, title=job.title, unit=" images")

    return encode


def open_encoder(checkpoint: Mapping[str, Any], job: FeatureJob, current_folder: str) -> PartMaker:
    """Open what a worker encodes with. Paths of the job are those of the command's folder."""
    from clip_jax.api import load_encoders

    if os.path.isdir(current_folder):
        os.chdir(current_folder)
    encoders = load_encoders(**checkpoint)
    return PartMaker(
        encoders.identity,
        make=lambda number: job.encode(encoders, number),
        folder=job.folder,
        is_begun=job.folder.is_dir,
    )
