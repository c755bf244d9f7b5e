"""Weights & Biases or trackio beside a run, in a process of its own that no step waits for."""

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from clip_jax.distribution import install_command
from clip_jax.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_TERMINATED, UserError
from clip_jax.evaluation.results import RESULTS
from clip_jax.parallel import distributed
from clip_jax.pretrained.work_folder import CONFIG_FILENAME
from clip_jax.sections import TrainSection
from clip_jax.training.metrics_sender import EXIT_TOLD, FINISH_SECONDS, LOG_FILENAME

STOPPED_SECONDS = 5.0
"""How long a run that a signal ended waits for the last lines: schedulers kill soon."""
_COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    " from clip_jax.training.metrics_sender import main; sys.exit(main(sys.argv[2:]))"
)


class MetricsService:
    """Starts and ends the process that sends the metrics, on process 0; of a run without, nothing.

    A process that fails says so itself, one that dies is told once, and the run goes on.

    Attributes:
      code: the exit code of the run, for the service.

    Args:
      section: its `report_to`, `report_project` and `report_name`.
      folder: the work folder.

    Raises:
      UserError: the service's package is not installed.
    """

    def __init__(self, section: TrainSection, folder: Path) -> None:
        self.code = EXIT_ERROR
        self._section, self._folder = section, folder
        self._process: subprocess.Popen[bytes] | None = None
        missing = distributed.from_first(_is_missing(section.report_to))
        if missing:
            raise UserError(
                f'config.train.report_to is "{section.report_to}", which is not installed: '
                f"{install_command(section.report_to)}"
            )

    def start(self) -> None:
        """Start sending; `metrics.jsonl` and `config.json` are in the work folder by now."""
        section = self._section
        if not section.report_to or not distributed.is_first():
            return
        name = section.report_name or self._folder.resolve().name
        args = (CONFIG_FILENAME, RESULTS, section.report_to, section.report_project, name)
        path = [entry or os.getcwd() for entry in sys.path]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, json.dumps(path), str(self._folder), *args],
                stdin=subprocess.PIPE,
            )
        except OSError as error:
            print(f"{section.report_to} cannot be started ({error.strerror}); the run goes on")

    def check(self) -> None:
        """Say so if the process has died."""
        process = self._process
        if process is None or process.poll() is None:
            return
        self._process = None
        if process.stdin is not None:
            process.stdin.close()
        if process.returncode not in (0, EXIT_TOLD):
            print(
                f"the process that sends metrics to {self._section.report_to} has ended with code "
                f"{process.returncode}; the run goes on without it; see {LOG_FILENAME} in "
                f"{self._folder}",
                flush=True,
            )

    def close(self) -> None:
        """Wait until the last lines are sent; a run that a signal ended does not wait for long.

        A process that is left ends by itself, `FINISH_SECONDS` after the run at the latest.
        """
        process = self._process
        if process is None:
            return
        was_stopped = self.code in (EXIT_INTERRUPTED, EXIT_TERMINATED)
        try:
            with suppress(OSError):
                process.communicate(
                    b"%d" % self.code, timeout=STOPPED_SECONDS if was_stopped else FINISH_SECONDS
                )
        except subprocess.TimeoutExpired:
            self._process = None
            print(
                f"{self._section.report_to} has not taken all metrics yet; the next start with "
                f"{self._folder} sends what is missing"
            )
        self.check()


def _is_missing(service: str) -> bool:
    """Return whether the package of a service is not there: a folder of its name is none."""
    if not service or not distributed.is_first():
        return False
    found = importlib.util.find_spec(service)
    return found is None or found.origin is None
