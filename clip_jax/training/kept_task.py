"""A second task that a run shall not forget: measured at its beginning, and watched."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError
from clip_jax.evaluation.in_training import Evaluator
from clip_jax.files import atomic_write
from clip_jax.parallel.distributed import from_first, is_first, print_on_main

KEPT_FILENAME = "keep.json"
PREFIX = "keep_"


class KeptTask:
    """Evaluates the task, and says when too much of it is lost.

    What was measured at the run's beginning lies in `keep.json`, so that a run that goes on
    compares with its beginning.

    Args:
      evaluate: measures the task.
      folder: the work folder.
      metric: what may fall.
      max_loss: by how much, as a share.
    """

    def __init__(self, evaluate: Evaluator, folder: Path, metric: str, max_loss: float) -> None:
        self._evaluate, self._path = evaluate, folder / KEPT_FILENAME
        self._metric, self._max_loss = metric, max_loss
        self._start = from_first(self._read() if is_first() else None)

    def _read(self) -> float | None:
        try:
            return float(json.loads(self._path.read_text(encoding="utf-8"))[self._metric])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def begin(self, variables: Any) -> None:
        """Measure the state that the run begins with, where that was not done.

        Raises:
          UserError: the task has no such metric.
        """
        if self._start is not None:
            return
        metrics = self._evaluate(variables)
        if self._metric not in metrics:
            raise UserError(
                f"config.eval.keep is watched by {self._metric}, and its tasks measure "
                f"{', '.join(sorted(metrics))}; name one in config.eval.best"
            )
        self._start = from_first(metrics[self._metric])
        print_on_main(f"the kept task begins with {PREFIX}{self._metric} {self._start:.4g}")
        if is_first():
            with atomic_write(self._path) as partial:
                partial.write_text(json.dumps(metrics) + "\n", encoding="utf-8")

    def measure(self, variables: Any) -> dict[str, float]:
        """Return the task's metrics by the names they have in the run's."""
        return {PREFIX + name: value for name, value in self._evaluate(variables).items()}

    def is_lost(self, metrics: Mapping[str, float]) -> bool:
        """Return whether the state of these metrics has lost more than it may."""
        value = from_first(metrics[PREFIX + self._metric])
        return self._start is not None and value < self._start - self._max_loss

    def verdict(self, step: int) -> str:
        """Return why the run ends at a step."""
        return (
            f"at step {step} {PREFIX}{self._metric} is more than config.eval.keep_loss "
            f"{self._max_loss:g} below the {self._start or 0:.4g} of the beginning"
        )
