"""A real run that is killed again and again sees the samples that it would have seen anyway."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_tiny import ROOT, command, environment, start_two, write_experiment

STEPS, KILLS = 60, 20
FLAGS = (
    f"--config.train.steps={STEPS}",
    "--config.checkpoint.every=2",
    "--config.checkpoint.keep=1",
    "--config.data.log_keys=True",
)


def keys_of(workdir: Path) -> dict[int, list[str]]:
    """Step -> the keys of its rows; every part of a step stands in the files exactly once."""
    parts: dict[int, dict[int, list[str]]] = {}
    for path in sorted(workdir.glob("keys-*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            step = parts.setdefault(line["step"], {})
            assert line["part"] not in step, (path, line["step"])
            step[line["part"]] = line["keys"]
            assert len(step) <= line["parts"]
    return {
        step: [key for part in sorted(parts[step]) for key in parts[step][part]]
        for step in sorted(parts)
    }


def start(experiment: Path, workdir: Path, processes: int, *flags: str) -> list[subprocess.Popen]:
    """The same command on two devices, of one process or of two."""
    if processes == 2:
        return start_two(experiment, workdir, *FLAGS, *flags, devices=1)
    line = [sys.executable, "-m", "clip_jax.main"]
    line += command(experiment, workdir, *FLAGS, *flags)
    with workdir.with_name(f"{workdir.name}.0.log").open("w") as out:
        return [subprocess.Popen(line, cwd=ROOT, env=environment(2), stdout=out, stderr=out)]


def kill_somewhere(processes: list[subprocess.Popen], workdir: Path, rng: random.Random) -> None:
    """At a random moment: mostly some steps after the first new one, now and then before it."""
    files = list(workdir.glob("keys-*.jsonl"))
    before = sum(path.stat().st_size for path in files)
    end = time.monotonic() + (rng.uniform(0, 5) if rng.random() < 0.2 else 120)
    while time.monotonic() < end and all(p.poll() is None for p in processes):
        found = sum(path.stat().st_size for path in workdir.glob("keys-*.jsonl"))
        if found > before:
            time.sleep(rng.uniform(0, 0.5))
            break
        before = min(before, found)  # the start drops the steps that come again
        time.sleep(0.01)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


@pytest.mark.slow
def test_killed_at_twenty_points_the_samples_are_those_of_one_run(tmp_path):
    """Also by two processes instead of one, and with other numbers of threads."""
    experiment = write_experiment(tmp_path / "data", shards=5, samples=13)
    (whole,) = start(experiment, tmp_path / "whole", 1)
    assert whole.wait() == 0, (tmp_path / "whole.0.log").read_text()
    want = keys_of(tmp_path / "whole")
    assert list(want) == list(range(1, STEPS + 1))
    # 65 pairs in 8 streams of 8 or 9: in 8 places of a stream no sample comes twice.
    assert all(len(set(want[s] + want[s + 1] + want[s + 2] + want[s + 3])) >= 56 for s in (1, 5))

    rng, workdir, reached = random.Random(7), tmp_path / "killed", []
    workdir.mkdir()
    for turn in range(KILLS):
        threads = f"--config.data.threads={rng.choice([1, 2, 5])}"
        kill_somewhere(start(experiment, workdir, 1 + (turn % 4 == 3), threads), workdir, rng)
        reached.append(max([int(p.name) for p in workdir.glob("checkpoints/[0-9]*")], default=0))
    assert reached[-1] < STEPS, f"the run was over before the last kill: {reached}"
    for processes in start(experiment, workdir, 2), start(experiment, workdir, 1):
        for process in processes:
            assert process.wait() == 0, (tmp_path / "killed.0.log").read_text()
    assert keys_of(workdir) == want
