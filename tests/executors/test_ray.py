"""Ray itself, three nodes of it on this machine; skipped where it is not installed."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_cases import write_shards
from embedded import write_tiny_model
from pairs import write_data
from run_tiny import ROOT, environment

pytest.importorskip("ray")

NODES = 3


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Start a head and two more nodes with a core each; end them all."""
    env = environment(1) | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    port = free_port()
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
    ray += ["--object-store-memory=100000000", "--log-color=false"]
    head = ["--head", f"--port={port}", "--node-ip-address=127.0.0.1"]
    head += ["--include-dashboard=false", f"--temp-dir=/tmp/ray-{port}"]
    others = [[f"--address=127.0.0.1:{port}", "--node-ip-address=127.0.0.1"]] * (NODES - 1)
    log_path = tmp_path_factory.mktemp("ray") / "nodes.txt"
    log = log_path.open("w")
    processes = []
    try:
        for flags in (head, *others):
            processes.append(
                subprocess.Popen(
                    [*ray, *flags], env=env, cwd="/", stdout=log, stderr=log, start_new_session=True
                )
            )
            _wait_for(log_path, len(processes))
        yield f"127.0.0.1:{port}"
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(60)
        log.close()
        shutil.rmtree(f"/tmp/ray-{port}", ignore_errors=True)


def _wait_for(log: Path, nodes: int) -> None:
    end = time.monotonic() + 120
    while log.read_text().count("Ray runtime started") < nodes:
        if time.monotonic() > end:
            raise TimeoutError(log.read_text()[-2000:])
        time.sleep(0.2)


def command(*args: str | Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, args)],
        env=environment(1),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def makers() -> list[int]:
    """Return the processes of Ray that make a part now."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::Worker.make"):
                pids.append(int(path.parent.name))
        except OSError:
            continue
    return pids


def ended(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, err
    return out, err


def test_shards_are_the_same_bytes(address, tmp_path):
    (tmp_path / "in").mkdir()
    write_shards(tmp_path / "in", [30, 23, 11])
    args = ["clip_jax.data.shard", tmp_path / "in", "--per-shard", "6", "--out"]
    ended(command(*args, tmp_path / "alone"))
    _, err = ended(command(*args, tmp_path / "many", "--executor", "ray", "--address", address))
    assert files(tmp_path / "many") == files(tmp_path / "alone")
    assert re.search(r"64/64 .*pair/s, \d workers?\]", err)


def test_a_cluster_that_is_not_there_is_one_line(tmp_path):
    (tmp_path / "in").mkdir()
    write_shards(tmp_path / "in", [3])
    args = ["clip_jax.data.shard", tmp_path / "in", "--out", tmp_path / "out", "--executor", "ray"]
    for where, line in (
        (f"127.0.0.1:{free_port()}", "no Ray cluster can be reached at 127.0.0.1"),
        ("somewhere", "--address somewhere is neither auto nor HOST:PORT"),
    ):
        _, err = ended(command(*args, "--address", where), code=2)
        assert err.startswith(f"error: {line}") and err.count("\n") == 1


@pytest.mark.slow
def test_ten_kills_and_an_interrupt_change_no_byte(address, tmp_path):
    (tmp_path / "words").mkdir()
    write_data(tmp_path / "words", samples=4)
    write_tiny_model(tmp_path / "model", tmp_path / "words/t.model")
    (tmp_path / "in").mkdir()
    write_shards(tmp_path / "in", [400] * 8)
    args = ["clip_jax.embed", "--model", tmp_path / "model", "--data", tmp_path / "in"]
    args += ["--batch-size", "8", "--part-size", "16", "--out"]
    ended(command(*args, tmp_path / "alone"))
    flags = ["--executor", "ray", "--address", address]
    rng, errors = random.Random(0), []
    for kills, code in ((5, 75), (5, 0)):
        process = command(*args, tmp_path / "many", *flags)
        while kills:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(rng.uniform(0.1, 1))
            if pids := makers():
                os.kill(rng.choice(pids), signal.SIGKILL)
                kills -= 1
        if code:
            process.send_signal(signal.SIGTERM)
        errors.append(ended(process, code)[1])
    assert files(tmp_path / "many") == files(tmp_path / "alone")
    # The last one before the signal may have died unheard.
    assert sum(text.count("is made by another") for text in errors) >= 8
