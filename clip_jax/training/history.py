"""What became of a run: `history.jsonl` in its work folder has a line for each start.

A line is {"time": ..., "step": 40, "steps": 100, "changes": {name: [before, now]}, ...}: the step
it went on from, what in its config or its files differed from the start before, and what it ran on.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from clip_jax import distribution
from clip_jax.parallel import distributed
from clip_jax.parallel.jax_internals import devices_started

HISTORY_FILENAME = "history.jsonl"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

Changes = dict[str, tuple[Any, Any]]
"""The value before and the value now, by name."""


def note_start(folder: Path, step: int, steps: int, changes: Changes) -> None:
    """Write the line of this start; one that the disk does not take is told and left out."""
    line = {
        "time": now(),
        "step": step,
        "steps": steps,
        "changes": changes,
        "processes": distributed.process_count(),
        **describe_process(),
    }
    path = folder / HISTORY_FILENAME
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        print(f"{path} cannot be written ({error.strerror}); this start is not in it")


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of all starts, without what is cut off or no such line; none without any."""
    try:
        lines = (folder / HISTORY_FILENAME).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    starts = []
    for line in lines:
        with suppress(ValueError):
            start = json.loads(line)
            if isinstance(start, dict) and {"step", "steps", "changes"} <= start.keys():
                starts.append(start)
    return starts


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def describe_process() -> dict[str, Any]:
    """Return what this process is: versions, devices, flags, and the commit of its code."""
    return {
        "devices": devices(),
        "versions": versions(),
        "commit": commit(),
        "flags": sys.argv[1:],
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") or name.startswith("JAX_")
        },
    }


def devices() -> str:
    """Return the number and the kind of all devices; "" before they are started."""
    return f"{jax.device_count()} {jax.devices()[0].device_kind}" if devices_started() else ""


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    found["clip_jax"] = distribution.version()
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str | None:
    """Return the commit that is checked out where this code lies; None outside a repository."""
    folder = Path(__file__).resolve().parents[2] / ".git"
    try:
        if folder.is_file():  # a worktree names its folder
            folder = Path(folder.read_text().removeprefix("gitdir:").strip())
        head = (folder / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head
        name = head.removeprefix("ref:").strip()
        shared = folder / "commondir"
        common = (folder / shared.read_text().strip()) if shared.exists() else folder
        loose = common / name
        if loose.exists():
            return loose.read_text().strip()
        packed = (common / "packed-refs").read_text().splitlines()
        return next((line.split()[0] for line in packed if line.endswith(" " + name)), None)
    except OSError:
        return None
