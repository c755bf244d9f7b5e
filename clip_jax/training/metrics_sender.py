"""The process that sends a run's `metrics.jsonl` to Weights & Biases or trackio.

`training.metrics_service.MetricsService` starts it. It reads the file as it grows, so that nothing
of a service can hold a run up, and notes in `report_to.json` how far it has come: what it could not
send is sent by the next start, and a resumed run goes on in the same run of the service. It ends
when its standard input is closed, which holds the run's exit code, or nothing if it was killed; the
figures of the final evaluation, `eval.json`, are sent then.
"""

import fcntl
import json
import math
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from clip_jax.errors import UserError, short
from clip_jax.files import atomic_write

STATE_FILENAME, LOG_FILENAME = "report_to.json", "report_to.log"
POLL_SECONDS = 1.0
FINISH_SECONDS = 60.0
"""How long a service may take for the last lines when the run has ended."""
EXIT_TOLD = 3
"""Of a process that has said itself why it ends."""


@dataclass
class Sent:
    """What a service has of a work folder.

    Attributes:
      project, id: the run of the service.
      step: the newest step whose metrics it has; -1 before the first.
      eval_step: the same of evaluations during the run.
      final: the step and the figures of the final evaluation that it has, as text.
    """

    project: str
    id: str
    step: int = -1
    eval_step: int = -1
    final: str = ""


@dataclass(frozen=True)
class Begun:
    """A run of a service.

    Attributes:
      log: takes a step and its numbers.
      finish: takes the exit code and waits until all is sent.
      place: where a user sees it.
    """

    log: Callable[[int, dict[str, float]], None]
    finish: Callable[[int], None]
    place: str


def begin_wandb(folder: Path, sent: Sent, name: str, config: dict[str, Any]) -> Begun:
    """Begin, or go on with, a run of Weights & Biases, whose environment variables it obeys."""
    import wandb

    run = wandb.init(
        project=sent.project,
        id=sent.id,
        name=name,
        dir=str(folder),
        config=config,
        resume="allow",
        settings=wandb.Settings(console="off"),
    )
    return Begun(
        log=lambda step, numbers: run.log(numbers, step=step),
        finish=lambda code: run.finish(exit_code=code),
        place=run.url or f"`wandb sync {Path(run.dir).parent}` sends it",
    )


def begin_trackio(folder: Path, sent: Sent, name: str, config: dict[str, Any]) -> Begun:
    """Begin, or go on with, a run of trackio, whose environment variables it obeys."""
    import trackio

    # trackio knows runs by their names.
    run = trackio.init(
        project=sent.project,
        name=f"{name}-{sent.id}",
        config=config,
        resume="allow",
        embed=False,
    )
    space = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
    return Begun(
        log=lambda step, numbers: run.log(numbers, step=step),
        finish=lambda code: run.finish(),
        place=space or f"`trackio show --project {sent.project}` shows it",
    )


SERVICES: dict[str, Callable[[Path, Sent, str, dict[str, Any]], Begun]] = {
    "wandb": begin_wandb,
    "trackio": begin_trackio,
}
"""The choices of config.train.report_to, which are the packages' names too."""


def read_sent(folder: Path, service: str, project: str) -> Sent:
    """Return what a service has of the folder: nothing, under a new id, in another project."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        sent = Sent(**json.loads((folder / STATE_FILENAME).read_text())[service])
        if sent.project == project:
            return sent
    return Sent(project, uuid.uuid4().hex[:12])


def write_sent(folder: Path, service: str, sent: Sent) -> None:
    """Note what a service has; a full disk keeps the older note."""
    path, services = folder / STATE_FILENAME, {}
    with suppress(OSError, ValueError):
        services = json.loads(path.read_text())
    with suppress(UserError), atomic_write(path) as partial:
        partial.write_text(json.dumps({**services, service: asdict(sent)}, indent=1) + "\n")


def new_lines(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Yield the lines behind the place of a file that are whole."""
    while True:
        start = file.tell()
        line = file.readline()
        if not line.endswith(b"\n"):
            file.seek(start)
            return
        yield json.loads(line)


def send_lines(file: BinaryIO, begun: Begun, sent: Sent) -> bool:
    """Send the new lines that the service lacks; return whether there were any."""
    before = (sent.step, sent.eval_step)
    for line in new_lines(file):
        step, kind = line.pop("step"), "step"
        if any(name.startswith("eval/") for name in line):
            kind = "eval_step"
        if step <= getattr(sent, kind):
            continue
        numbers = {
            name: value
            for name, value in line.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        begun.log(step, numbers)
        setattr(sent, kind, step)
    return (sent.step, sent.eval_step) != before


def final_figures(path: Path) -> dict[str, float]:
    """Return the figures of an `eval.json` as evaluations during the run name them; of none, {}.

    Those of `few_shot` end in the number of shots, "eval/lp_acc1@4".
    """
    figures: dict[str, float] = {}
    with suppress(OSError, ValueError, KeyError, TypeError):
        for result in json.loads(path.read_text(encoding="utf-8"))["results"]:
            shots = result["metrics"].get("fewshot_k") or -1
            suffix = f"@{shots:g}" if shots > 0 else ""
            for name, value in result["metrics"].items():
                if isinstance(value, int | float):  # null stands for NaN
                    figures.setdefault(f"eval/{name}{suffix}", value)
    return figures


def send_final(path: Path, begun: Begun, sent: Sent) -> bool:
    """Send the figures of the final evaluation that the service lacks; return whether it did."""
    figures = final_figures(path)
    final = json.dumps([sent.step, figures])
    if not figures or final == sent.final:
        return False
    begun.log(sent.step, figures)
    sent.final = final
    return True


class RunEnd:
    """Waits in a thread for the end of the run, and ends this process if a service hangs then."""

    def __init__(self) -> None:
        self.code = 255
        self._event = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with suppress(OSError, ValueError):
            self.code = int(sys.stdin.buffer.read())
        self._event.set()
        time.sleep(FINISH_SECONDS)
        os._exit(1)

    def wait(self, seconds: float) -> bool:
        """Wait so long; return whether the run has ended."""
        return self._event.wait(seconds)


def send(
    folder: Path,
    config_filename: str,
    results_filename: str,
    service: str,
    project: str,
    name: str,
    told: Callable[[str], None],
) -> None:
    """Send a run's metrics until it ends."""
    end = RunEnd()
    with suppress(OSError):  # a file system without locks
        # The process of the start before may be sending its last lines. A service's own processes
        # do not inherit this descriptor.
        fcntl.flock(os.open(folder / LOG_FILENAME, os.O_WRONLY), fcntl.LOCK_EX)
    sent = read_sent(folder, service, project)
    write_sent(folder, service, sent)
    config = json.loads((folder / config_filename).read_text())["config"]
    begun = SERVICES[service](folder, sent, name, config)
    told(f"metrics go to {service}, run {name} ({sent.id}) of project {project}: {begun.place}")
    with (folder / "metrics.jsonl").open("rb") as file:
        has_ended = False
        while not has_ended:
            has_ended = end.wait(POLL_SECONDS)
            if send_lines(file, begun, sent):
                write_sent(folder, service, sent)
    if end.code == 0 and send_final(folder / results_filename, begun, sent):
        write_sent(folder, service, sent)
    begun.finish(end.code)


def main(args: Sequence[str]) -> int:
    """Send a run's metrics: work folder, names of config and results, service, project, name."""
    # The run decides when it ends, also where a signal goes to all processes.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    folder = Path(args[0])
    config_filename, results_filename, service, project, name = args[1:]
    # What a service prints has a file of its own.
    lines = os.fdopen(os.dup(1), "w")
    log = os.open(folder / LOG_FILENAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)

    def told(line: str) -> None:
        with suppress(OSError):
            print(line, file=lines, flush=True)

    try:
        send(folder, config_filename, results_filename, service, project, name, told)
    except Exception as error:
        told(
            f"{service} takes no metrics ({short(error):.300}); the run goes on without it, and "
            f"the next start with this work folder sends what is missing; see {LOG_FILENAME} in it"
        )
        return EXIT_TOLD
    return 0
