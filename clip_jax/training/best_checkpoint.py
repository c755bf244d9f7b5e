"""The best state of a run by a metric of its evaluations: `best/` in the run's work folder.

It is a work folder of its own, with one checkpoint, so that `clip_jax.load` and every command take
`runs/x/best` as they take `runs/x`. The metric's value lies in the checkpoint: a run that was
killed and goes on knows what is to be beaten.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError
from clip_jax.parallel.distributed import from_first, is_first, print_on_main
from clip_jax.pretrained.work_folder import RunDescription, write_description
from clip_jax.training.checkpoint import Checkpoints
from clip_jax.training.state import TrainState

BEST_DIRNAME = "best"


class BestCheckpoint:
    """Keeps the state with the highest value of a metric, the earliest of equal ones."""

    def __init__(self, workdir: Path, metric: str, description: RunDescription) -> None:
        self._metric = metric
        self._checkpoints = Checkpoints(workdir / BEST_DIRNAME)
        if is_first():
            write_description(workdir / BEST_DIRNAME, description)
        meta = self._checkpoints.latest_meta()
        self._value = None if meta is None else meta["metrics"].get(metric)

    def offer(
        self,
        state: TrainState,
        step: int,
        metrics: Mapping[str, float],
        fingerprint: dict[str, Any],
    ) -> None:
        """Keep this state if it is better than all before it.

        Raises:
          UserError: the evaluations have no such metric.
        """
        if self._metric not in metrics:
            raise UserError(
                f"config.eval.best is {self._metric!r}; the evaluations during the run measure "
                + ", ".join(sorted(metrics))
            )
        value = from_first(metrics[self._metric])
        if self._value is not None and value <= self._value:
            return
        self._value = value
        self._checkpoints.save(state, step, fingerprint, metrics=dict(metrics))
        print_on_main(
            f"step {step} is the best so far: {self._metric} {value:.4g}, kept in {BEST_DIRNAME}/"
        )

    def __enter__(self) -> "BestCheckpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        """Wait for what is being saved, and close the checkpoints."""
        self._checkpoints.close()
