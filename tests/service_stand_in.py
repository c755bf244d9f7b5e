"""A package that stands in for trackio in the process that sends a run's metrics."""

from pathlib import Path

import pytest

STAND_IN = """
import json, os

FAILS = os.environ.get("STAND_IN_FAILS", "")


def note(**values):
    with open(os.environ["STAND_IN_FILE"], "a") as file:
        file.write(json.dumps(values) + "\\n")


class Run:
    def log(self, numbers, step):
        if FAILS == "log":
            raise ConnectionError("the service\\nis gone")
        note(step=step, **numbers)

    def finish(self):
        note(finished=True)


def init(project, name, config, resume, embed):
    if FAILS == "init":
        import time

        time.sleep(1000)
    note(project=project, name=name, seed=config["seed"], resume=resume)
    return Run()
"""


def put_stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put it in front of all other packages; return the file that it writes what it gets to."""
    packages = folder / "packages"
    packages.mkdir()
    (packages / "trackio.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.setenv("STAND_IN_FILE", str(folder / "sent.jsonl"))
    return folder / "sent.jsonl"
