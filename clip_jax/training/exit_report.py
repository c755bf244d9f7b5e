"""Why a run ended: `exit.json` in its work folder, written at every end that a process can see.

It holds the reason and the exit code, the metrics of the last steps, what the process was
(versions, devices, flags, the code's commit), the config, and the lines of `history.jsonl`. Process
1 writes `exit-1.json` and so on. A killed process writes none: its last `exit.json` is of the end
before, which its time says.
"""

import dataclasses
import json
import threading
import traceback
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from clip_jax.errors import EXIT_ERROR, Terminated, UserError, exit_code, short
from clip_jax.files import atomic_write
from clip_jax.parallel import distributed, watchdog
from clip_jax.sections import Config
from clip_jax.training.history import describe_process, now, read_history
from clip_jax.training.metrics import to_json

EXIT_FILENAME = "exit.json"
LAST_STEPS = 100


class ExitReport:
    """A context manager around a run that writes `exit.json` at its end.

    Attributes:
      code, reason: of a good end, which the run sets; an exception has its own.
      owns_folder: whether the work folder is known to be this run's. Before that a report that is
        there is left alone: a start that is refused is no end of that run.

    Args:
      folder: the work folder.
      config: the experiment.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        index = distributed.process_index()
        self._path = folder / (f"exit-{index}.json" if index else EXIT_FILENAME)
        self._folder, self._config = folder, config
        self._steps: deque[dict[str, Any]] = deque(maxlen=LAST_STEPS)
        self._lock, self._is_written = threading.Lock(), False
        self.code, self.reason = EXIT_ERROR, "it ended without a reason"
        self.owns_folder = False

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take in the metrics of a step."""
        self._steps.append({"step": step, **metrics})

    def write(self, code: int, reason: str, *, stack: str = "") -> None:
        """Write the report; what the disk does not take is told, and ends nothing."""
        with self._lock:
            is_foreign = self._path.exists() and not self.owns_folder
            if self._is_written or is_foreign or not self._folder.is_dir():
                return
            self._is_written = True
            values = {
                "code": code,
                "reason": reason,
                "time": now(),
                "last_step": self._steps[-1]["step"] if self._steps else None,
                **({"stack": stack} if stack else {}),
                **describe_process(),
                "history": read_history(self._folder),
                "config": dataclasses.asdict(self._config),
                "steps": list(self._steps),
            }
            try:
                with atomic_write(self._path) as partial:
                    partial.write_text(json.dumps(to_json(values), indent=1) + "\n")
            except UserError as error:
                print(f"note: {error}", flush=True)

    def __enter__(self) -> "ExitReport":
        watchdog.before_exit(self.write)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        watchdog.before_exit(None)
        if error is None:
            self.write(self.code, self.reason)
        elif isinstance(error, UserError):
            self.write(exit_code(error), str(error))
        elif isinstance(error, KeyboardInterrupt):
            was_told = isinstance(error, Terminated)
            reason = "SIGTERM before or behind the steps" if was_told else "interrupted"
            self.write(exit_code(error), reason)
        else:
            stack = "".join(traceback.format_exception(error))
            self.write(exit_code(error), short(error), stack=stack)
