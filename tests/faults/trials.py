"""What a trial is, and the commands that trials start."""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pairs import run_losses
from run_tiny import ROOT, command, environment, write_experiment

STEPS, EVERY = 24, 3
LONGEST = 240.0
"""Seconds until a command counts as hung."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One fault: whether it was survived, and in a few words what came of it."""

    survived: bool
    outcome: str


@dataclasses.dataclass(frozen=True)
class Campaign:
    """What all kinds of faults start from.

    Attributes:
      folder: where everything is written.
      experiment: of a tiny model on 60 pairs.
      whole: the work folder of an undisturbed run.
      losses: its losses.
    """

    folder: Path
    experiment: Path
    whole: Path
    losses: list[tuple[int, float]]


Kind = Callable[["Campaign", int, int], Iterator[Trial]]
"""(campaign, count, seed) -> that many trials, each as soon as it is known."""

_started: list[subprocess.Popen[str]] = []


def started(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    """Remember a process, so that none outlives a campaign that is interrupted."""
    _started[:] = [p for p in _started if p.poll() is None]
    _started.append(process)
    return process


def kill_started() -> None:
    """Kill the processes that run."""
    for process in _started:
        process.kill()
        process.wait()


def begin(folder: Path) -> Campaign:
    """Write the data and make the undisturbed run."""
    experiment = write_experiment(folder / "data", shards=3, samples=20)
    code, text = finish(start(experiment, folder / "whole"))
    if code:
        raise SystemExit(f"the undisturbed run ended with {code}: {text}")
    return Campaign(folder, experiment, folder / "whole", run_losses(folder / "whole"))


def start(experiment: Path, workdir: Path, *args: str) -> subprocess.Popen[str]:
    """Start the command of a run on one device."""
    flags = [f"--config.train.steps={STEPS}", f"--config.checkpoint.every={EVERY}", *args]
    line = [sys.executable, "-m", "clip_jax.main", *command(experiment, workdir, *flags)]
    # To a file: a pipe that nobody reads would stop the run.
    with workdir.with_name(f"{workdir.name}.log").open("a+") as out:
        return started(
            subprocess.Popen(line, cwd=ROOT, env=environment(1), stdout=out, stderr=out, text=True)
        )


def finish(process: subprocess.Popen[str], seconds: float = LONGEST) -> tuple[int | None, str]:
    """Wait for a command; return its exit code, None if it hung, and all that it printed."""
    try:
        code: int | None = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        code = None
    name = Path(process.args[process.args.index("--workdir") + 1])  # type: ignore[index, union-attr]
    path = name.with_name(f"{name.name}.log")
    return code, path.read_text() if path.exists() else ""


def judged(
    campaign: Campaign,
    workdir: Path,
    code: int | None,
    text: str,
    fault: str,
    losses: list[tuple[int, float]] | None = None,
) -> Trial:
    """Return the trial of a run that was to go on to its end with the undisturbed run's losses."""
    if code is None:
        return Trial(False, f"{fault}: hung")
    if "Traceback" in text:
        return Trial(False, f"{fault}: a traceback: {text.strip().splitlines()[-1][:200]}")
    if code:
        return Trial(False, f"{fault}: exit code {code}: {text.strip().splitlines()[-1][:200]}")
    if run_losses(workdir) != (losses or campaign.losses):
        return Trial(False, f"{fault}: other losses")
    return Trial(True, fault)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for a condition, or the process's end."""
    end = time.monotonic() + LONGEST
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
