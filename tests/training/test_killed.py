"""A run that is killed again and again sees the samples that it would have seen anyway."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from run_tiny import ROOT, command, environment, start_two, write_experiment

STEPS, KILLS = 60, 20
FLAGS = (
    f"--config.train.steps={STEPS}",
    "--config.checkpoint.every=3",
    "--config.checkpoint.keep=1",
    "--config.data.log_keys=True",
)


def keys_of(workdir: Path) -> dict[int, list[str]]:
    """Return the keys of every step's rows; each part of a step is in the files exactly once."""
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
    """Start the same command on two devices, of one process or of two."""
    if processes == 2:
        return start_two(experiment, workdir, *FLAGS, *flags, devices=1)
    line = [sys.executable, "-m", "clip_jax.main"]
    line += command(experiment, workdir, *FLAGS, *flags)
    with workdir.with_name(f"{workdir.name}.0.log").open("w") as out:
        return [subprocess.Popen(line, cwd=ROOT, env=environment(2), stdout=out, stderr=out)]


def kill_somewhere(processes: list[subprocess.Popen], workdir: Path, rng: random.Random) -> None:
    """Kill a run at a random moment: mostly soon after its first new step, at times before it."""
    files = list(workdir.glob("keys-*.jsonl"))
    before = sum(path.stat().st_size for path in files)
    end = time.monotonic() + (rng.uniform(0, 5) if rng.random() < 0.2 else 120)
    while time.monotonic() < end and all(p.poll() is None for p in processes):
        found = sum(path.stat().st_size for path in workdir.glob("keys-*.jsonl"))
        if found > before:
            time.sleep(rng.uniform(0, 0.6))
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
    # 65 pairs in 8 streams of 8 or 9, of which a step takes 2 each: no pair twice in 4 steps.
    assert len({key for step in range(1, 5) for key in want[step]}) == 64

    def killed_and_run_to_its_end(seed: int) -> Path:
        rng, workdir = random.Random(seed), tmp_path / f"killed-{seed}"
        workdir.mkdir()
        for turn in range(KILLS // 2):
            threads = f"--config.data.threads={rng.choice([1, 2, 5])}"
            kill_somewhere(start(experiment, workdir, 1 + turn % 2, threads), workdir, rng)
        assert max(keys_of(workdir)) < STEPS, "the run was over before the last kill"
        for process in start(experiment, workdir, 1 + seed % 2):
            assert process.wait() == 0, workdir.with_name(f"{workdir.name}.0.log").read_text()
        return workdir

    with ThreadPoolExecutor(2) as pool:
        for workdir in pool.map(killed_and_run_to_its_end, (1, 2)):
            assert keys_of(workdir) == want
