"""Several processes as one run, by the real command line on loopback, and the parts of it alone."""

import collections
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from pairs import run_losses
from run_tiny import (
    ROOT,
    environment,
    free_port,
    log,
    run_one,
    run_two,
    start_two,
    write_experiment,
)

from clip_jax.errors import EXIT_ERROR, EXIT_TERMINATED, EXIT_USAGE, UserError
from clip_jax.models.clip import CLIP, init_variables
from clip_jax.models.zoo import model_config
from clip_jax.parallel import cluster, distributed, watchdog
from clip_jax.parallel.limits import Limits
from clip_jax.parallel.mesh import AXES, batch_part, make_mesh
from clip_jax.sections import OptimSection, TrainSection
from clip_jax.training import batch_feed, trainer
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.state import device_bytes, make_state, state_shapes

FSDP = "--config.mesh.fsdp=8"  # over both processes


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return write_experiment(tmp_path_factory.mktemp("pairs"))


def assert_same_losses(a, b, rtol):
    a, b = run_losses(a), run_losses(b)
    assert [step for step, _ in a] == [step for step, _ in b]
    np.testing.assert_allclose([x for _, x in a], [x for _, x in b], rtol=rtol)


def lines_of(text: str) -> list[str]:
    """Return the lines of a process, without Gloo's about its own connections."""
    return [line for line in text.splitlines() if line and not line.startswith("[Gloo]")]


@pytest.mark.slow
def test_two_processes_train_as_one(experiment, tmp_path):
    done = run_two(experiment, tmp_path / "two", FSDP, "--config.train.steps=3")
    assert done.returncode == 0, done.stderr
    # Process 0 alone speaks: every line is there once.
    lines = lines_of(done.stdout)
    assert [line for line in lines if line.startswith("step 3/3")] == lines[-1:]
    assert max(collections.Counter(lines).values()) == 1, lines
    assert not lines_of(done.stderr)
    assert len(list((tmp_path / "two").glob("events.out.tfevents.*"))) == 1

    alone = run_one(experiment, tmp_path / "one", FSDP, "--config.train.steps=3")
    assert alone.returncode == 0, alone.stderr
    # The same programs with sums between devices in another order.
    assert_same_losses(tmp_path / "two", tmp_path / "one", 1e-5)


@pytest.mark.slow
def test_fifty_steps_on_two_processes_one_process_and_one_device(experiment, tmp_path):
    steps = "--config.train.steps=50"
    done = run_two(experiment, tmp_path / "two", FSDP, steps)
    assert done.returncode == 0, done.stderr
    assert run_one(experiment, tmp_path / "eight", FSDP, steps).returncode == 0
    assert run_one(experiment, tmp_path / "one", steps, devices=1).returncode == 0
    # Float32 sums in another order, carried on over 50 steps.
    assert_same_losses(tmp_path / "two", tmp_path / "eight", 1e-5)
    assert_same_losses(tmp_path / "two", tmp_path / "one", 1e-5)


@pytest.mark.slow
def test_two_processes_evaluate_as_one(experiment, tmp_path):
    """During the run and at its end; every process takes part, and the report follows."""
    data = ["--config.eval.data", str(experiment.parent / "00001.tar")]
    data += ["--config.eval.classnames", str(experiment.parent / "names.txt")]
    done = run_two(
        experiment, tmp_path / "two", "--config.train.steps=3", "--config.eval.every=2", *data
    )
    assert done.returncode == 0, done.stderr
    lines = lines_of(done.stdout)
    assert lines[-1].startswith("report: ") and max(collections.Counter(lines).values()) == 1
    assert sum(line.startswith("step 2 evaluated:") for line in lines) == 1

    command = [sys.executable, "-m", "clip_jax.evaluate", "--model", str(tmp_path / "two")]
    command += ["--out", str(tmp_path / "one")]
    alone = subprocess.run(
        command, cwd=ROOT, env=environment(devices=1), capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr
    got, want = (
        json.loads((tmp_path / name / "eval.json").read_text())["results"]
        for name in ("two", "one")
    )
    for a, b in zip(got, want, strict=True):
        assert a["task"] == b["task"] and a["images"] == b["images"] == 48
        # The counts are the same; a confidence is a float32 sum in another order.
        assert a["metrics"] == pytest.approx(b["metrics"], abs=1e-6)


def wait_for(path: Path, text: str, processes: list[subprocess.Popen]) -> None:
    """Wait until a log holds a text; a process that ends before is a failure."""
    while text not in path.read_text():
        if any(process.poll() is not None for process in processes):
            for process in processes:
                process.kill()
                process.wait()
            pytest.fail(f"ended before {text!r}: {path.read_text()}")
        time.sleep(0.05)


def outcome(processes: list[subprocess.Popen], workdir: Path) -> tuple[list[int], list[list[str]]]:
    """Return exit codes and lines of both processes, when they have ended."""
    codes = [process.wait(timeout=200) for process in processes]
    return codes, [lines_of(log(workdir, i).read_text()) for i in range(2)]


RUN = ("--config.mesh.fsdp=4", "--config.train.steps=40", "--config.checkpoint.every=10")


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    codes, lines = outcome(start_two(experiment, workdir, *RUN), workdir)
    assert codes == [0, 0], lines
    return workdir


def newest(workdir: Path) -> int:
    return max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


@pytest.mark.slow
def test_sigterm_on_one_of_two_saves_one_step_in_both(experiment, whole, tmp_path):
    workdir = tmp_path / "run"
    processes = start_two(experiment, workdir, *RUN)
    wait_for(log(workdir, 0), "step 12/40", processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, lines = outcome(processes, workdir)
    assert codes == [EXIT_TERMINATED] * 2, lines
    step = newest(workdir)
    assert f"saved step {step} of 40; the same command goes on from there" in lines[0]
    assert f"SIGTERM on process 1: saving step {step}, then exiting" in lines[0]
    assert lines[1] == []
    assert 12 <= step < 40

    other = tmp_path / "other"
    subprocess.run(["cp", "-r", workdir, other], check=True)
    codes, lines = outcome(start_two(experiment, workdir, *RUN), workdir)
    assert codes == [0, 0] and f"going on from step {step} of {workdir}" in lines[0], lines
    assert run_losses(workdir) == run_losses(whole)
    # One process with other devices: float32 sums in another order, over the steps that are left.
    assert run_one(experiment, other, *RUN[1:], devices=2).returncode == 0
    assert_same_losses(other, whole, 1e-5)


@pytest.mark.slow
def test_what_one_process_cannot_read_both_set_aside(experiment, whole, tmp_path):
    workdir = tmp_path / "run"
    subprocess.run(["cp", "-r", whole, workdir], check=True)
    for path in (workdir / "checkpoints" / "40" / "train").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    codes, lines = outcome(start_two(experiment, workdir, *RUN), workdir)
    assert codes == [0, 0], lines
    assert sum("checkpoint 40 is damaged and moved to" in line for line in lines[0]) == 1
    assert f"going on from step 30 of {workdir}" in lines[0]
    assert [p.name for p in (workdir / "quarantine").iterdir()] == ["40"]
    assert run_losses(workdir) == run_losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other(experiment, tmp_path, victim):
    workdir = tmp_path / "run"
    args = ("--config.train.steps=100000", "--heartbeat-seconds=3", "--config.mesh.fsdp=4")
    processes = start_two(experiment, workdir, *args)
    wait_for(log(workdir, 0), "step      5/100000", processes)
    processes[victim].send_signal(signal.SIGKILL)
    codes, lines = outcome(processes, workdir)
    assert codes[victim] == -signal.SIGKILL
    text = "\n".join(lines[1 - victim])
    if victim == 1:
        assert codes[0] == EXIT_ERROR, text
        assert "error: process 0 ends: process 1 of 2 has given no sign of life for 3 s" in text
    else:
        # The coordinator dies with process 0: either ours or JAX's own watch sees it first.
        assert codes[1] in (EXIT_ERROR, -signal.SIGABRT), text
        assert "the coordinator, cannot be reached" in text or "leader task" in text


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_ends_the_other_in_time(experiment, tmp_path, victim):
    workdir = tmp_path / "run"
    args = ("--config.train.steps=100000", "--heartbeat-seconds=3", "--config.mesh.fsdp=4")
    processes = start_two(experiment, workdir, *args)
    wait_for(log(workdir, 0), "step      5/100000", processes)
    processes[victim].send_signal(signal.SIGSTOP)
    try:
        assert processes[1 - victim].wait(timeout=60) == EXIT_ERROR
    finally:
        processes[victim].send_signal(signal.SIGCONT)
        processes[victim].wait(timeout=60)
    line = lines_of(log(workdir, 1 - victim).read_text())[-1]
    reason = (
        "process 0, the coordinator, has not answered for 3 s"
        if victim == 0
        else "process 1 of 2 has given no sign of life for 3 s"
    )
    assert line.startswith(f"error: process {1 - victim} ends: {reason}"), line
    report = workdir / ("exit-1.json" if victim == 0 else "exit.json")
    assert json.loads(report.read_text())["reason"].startswith(reason)


@pytest.mark.slow
def test_a_process_that_never_comes_ends_the_other_in_time(experiment, tmp_path):
    flags = [f"--coordinator=localhost:{free_port()}", "--num-processes=2", "--process-id=0"]
    flags += ["--init-seconds=3"]
    done = run_one(experiment, tmp_path / "run", "--config.train.steps=1", *flags, devices=1)
    assert done.returncode == EXIT_USAGE, done.stderr
    line = lines_of(done.stderr)[-1]
    assert line.startswith(
        "error: not all of 2 processes joined within 3 s (--init-seconds); start"
    )


@pytest.mark.slow
def test_killed_inside_a_save_of_two_processes(experiment, whole, tmp_path):
    workdir = tmp_path / "run"
    processes = start_two(experiment, workdir, *RUN, "--heartbeat-seconds=3")
    # Orbax writes beside the checkpoint's own name, and renames at the end.
    while not list((workdir / "checkpoints").glob("*tmp*")):
        if any(process.poll() is not None for process in processes):
            pytest.fail(f"ended before a save: {outcome(processes, workdir)}")
        time.sleep(0.001)
    for process in processes:
        process.kill()
    outcome(processes, workdir)
    codes, lines = outcome(start_two(experiment, workdir, *RUN), workdir)
    assert codes == [0, 0], lines
    assert run_losses(workdir) == run_losses(whole)


@pytest.mark.slow
def test_a_signal_in_an_evaluation_of_two_processes_saves_in_both(experiment, tmp_path):
    workdir, folder = tmp_path / "run", experiment.parent
    args = [*RUN, "--config.eval.every=4", f"--config.eval.classnames={folder}/names.txt"]
    args.append(f"--config.eval.data={folder}/{{00000..00001}}.tar")
    processes = start_two(experiment, workdir, *args)
    wait_for(log(workdir, 0), "step  4/40", processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, lines = outcome(processes, workdir)
    assert codes == [EXIT_TERMINATED] * 2, lines
    assert f"saved step {newest(workdir)} of 40; the same command goes on from there" in lines[0]


@pytest.mark.slow
def test_a_mistake_in_one_process_ends_both_with_its_line(experiment, tmp_path):
    workdir = tmp_path / "run"
    wrong = ("--config.data.train=nothing-{0..1}.tar",)
    args = ("--config.train.steps=3",)
    codes, lines = outcome(start_two(experiment, workdir, *args, second=wrong), workdir)
    assert codes == [EXIT_ERROR, EXIT_USAGE], lines
    assert len(lines[1]) == 1 and lines[1][0].startswith("error: process 1: ")
    assert "nothing-{0..1}.tar" in lines[1][0]
    assert lines[0][-1].startswith("error: process 0 ends: process 1 failed: ")

    other = ("--config.seed=1",)
    codes, lines = outcome(start_two(experiment, workdir, *args, second=other), workdir)
    assert EXIT_USAGE in codes and 0 not in codes, lines
    assert "start all processes with the same command" in "".join(lines[0] + lines[1])


@pytest.mark.slow
def test_nobody_there_is_one_line(experiment, tmp_path):
    # Process 1, and no process 0.
    flags = ["--coordinator=localhost:1", "--num-processes=2", "--process-id=1", "--init-seconds=2"]
    done = run_one(experiment, tmp_path / "run", "--config.train.steps=1", *flags, devices=1)
    assert done.returncode == EXIT_USAGE, done.stderr
    line = lines_of(done.stderr)[-1]
    assert line.startswith("error: not all processes joined within 2 s (coordinator localhost:1)")


GATHER = """
import sys
from clip_jax.parallel import cluster, distributed, jax_internals
from clip_jax.parallel.watchdog import ending_together

index = int(sys.argv[2])
cluster.join(sys.argv[1], 2, index)
with ending_together():
    big = distributed.gather({"name": "\\u00e9", "text": chr(97 + index) * 20_000_000})
    assert [(x["name"], x["text"][0], len(x["text"])) for x in big] == [
        ("\\u00e9", "a", 20_000_000), ("\\u00e9", "b", 20_000_000)
    ]
    for number in range(12):
        assert distributed.gather(number + index) == [number, number + 1]
    assert distributed.from_first(index) == 0
    client = jax_internals.coordination_client()
    kept = client.key_value_dir_get("clip_jax/shared/")
    assert sum(len(value) for _, value in kept) < 100, kept
    assert not jax_internals.devices_started()
print("gathered")
"""


def test_values_of_many_megabytes_are_gathered_before_devices_start_and_then_forgotten():
    address = f"localhost:{free_port()}"
    lines = [[sys.executable, "-c", GATHER, address, str(index)] for index in range(2)]
    processes = [
        subprocess.Popen(
            line, cwd=ROOT, env=environment(1), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for line in lines
    ]
    for process in processes:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and b"gathered" in out, out.decode()


def test_processes_that_have_not_joined_are_refused_not_taken_for_one(monkeypatch):
    assert distributed.gather("x") == ["x"]
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match=r"counts 4 processes .*jax.distributed.initialize"):
        distributed.gather("x")


@pytest.mark.slow
def test_a_big_model_is_made_in_parts():
    """ViT-L/14 over 8 devices: the program that makes it holds an eighth, and little on top.

    Two blocks a tower: the compiler takes minutes for all of them.
    """
    optimizer = make_optimizer(lambda step: 1e-3, OptimSection())
    sizes = model_config("ViT-L/14")
    sizes = dataclasses.replace(
        sizes,
        vision=dataclasses.replace(sizes.vision, layers=2),
        text=dataclasses.replace(sizes.text, layers=2),
    )
    model, section = CLIP(sizes), TrainSection()
    shapes = state_shapes(model, optimizer, make_mesh(data=1, fsdp=8, tensor=1), section)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)

    def init():
        return make_state(init_variables(model, 0), optimizer, section)

    make = jax.jit(init, out_shardings=shardings)
    stats = make.lower().compile().memory_analysis()
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    share = device_bytes(shapes)
    assert share < 1.02 * whole / 8  # what is small stays on every device
    assert stats.output_size_in_bytes < 1.01 * share  # with the table of its pointers
    # Random bits on the way, of the largest arrays; the whole would be eight shares.
    assert stats.temp_size_in_bytes < share


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("node0:1", None, None), "--num-processes and --process-id are missing"),
        ((None, 2, 0), "--coordinator is missing"),
        (("node0", 2, 0), "--coordinator node0 is not HOST:PORT"),
        (("node0:1", 2, 2), "--process-id 2 is not among --num-processes 2"),
        (("node0:1", 2, -1), "they count from 0"),
    ],
)
def test_half_given_flags_are_one_line(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        cluster.join(*flags)
    assert "\n" not in str(caught.value)


@pytest.fixture
def joined(monkeypatch):
    """Return the arguments that `join` hands to JAX, in an environment without a cluster."""
    calls = []
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "KUBERNETES_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append(a))
    monkeypatch.setattr(cluster, "wait_for", lambda address, seconds: None)
    monkeypatch.setattr(watchdog, "start", lambda limits: None)
    monkeypatch.setattr(jax.config, "update", lambda *a: None)
    return calls


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "2",
}
MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.mark.parametrize(
    ("environment", "calls"),
    [
        ({}, []),
        # One process a node drives all its devices; several share them as JAX does.
        (SLURM, [(None, None, None, [])]),
        (SLURM | {"SLURM_NTASKS": "4"}, [(None, None, None, None)]),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, []),
        (MPI, [(None, None, None, None)]),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, [(None, None, None, [])]),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, []),
    ],
)
def test_who_joins_comes_from_the_environment(environment, calls, joined, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cluster.join()
    assert joined == calls


def test_flags_go_before_the_environment(joined, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    cluster.join(processes=1)
    assert joined == []
    cluster.join("node0:1", 2, 1)
    cluster.join("node0:1", 2, 1, [0, 1])
    assert joined == [("node0:1", 2, 1, []), ("node0:1", 2, 1, [0, 1])]


def test_a_coordinator_is_waited_for_until_it_listens():
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        cluster.wait_for(address, 5)
    with pytest.raises(OSError, match="refused"):
        cluster.wait_for(address, 0)


def test_a_strange_cluster_is_one_line(joined, monkeypatch):
    for name, value in (SLURM | {"SLURM_NTASKS": "many"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"looks like SlurmCluster .*--num-processes 1"):
        cluster.join()


class Device:
    def __init__(self, process_index: int):
        self.process_index = process_index


def fake_mesh(processes: int, each: int, data: int, fsdp: int, tensor: int) -> SimpleNamespace:
    """Make what `batch_part` reads of a mesh: JAX's own takes devices that exist only."""
    devices = np.array([Device(i // each) for i in range(processes * each)], object)
    shape = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    return SimpleNamespace(devices=devices.reshape(data, fsdp, tensor), shape=shape)


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((2, 4, 1), [0, 1]),
        ((1, 8, 1), [0, 1]),
        ((1, 2, 4), [0, 1]),
        ((1, 1, 8), [0, 0]),  # an axis that splits no rows spans both processes
    ],
)
def test_processes_with_the_same_rows_load_the_same_part(shape, parts, monkeypatch):
    mesh = fake_mesh(2, 4, *shape)
    found = []
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        found.append(batch_part(mesh))
    assert found == [(part, max(parts) + 1) for part in parts]


def test_rows_that_are_half_shared_are_refused():
    with pytest.raises(UserError, match="spans processes unevenly"):
        batch_part(fake_mesh(2, 3, 1, 3, 2))


def test_streams_have_to_divide():
    trainer.check_streams(8, 4)
    with pytest.raises(UserError, match=r"config.data.streams 8 is not a multiple of 3.*take 9"):
        trainer.check_streams(8, 3)


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_are_announced_before_the_step_before_them(processes, monkeypatch):
    monkeypatch.setattr(distributed, "process_count", lambda: processes)
    events = []

    class FakeAnnouncement:
        def __init__(self, batch):
            events.append(f"announce {batch}")
            self.batch = batch

        def result(self):
            return self.batch * 10

    got = []
    for batch, answer in batch_feed.announced(iter(range(9)), 3, FakeAnnouncement):
        events.append(f"step {batch}")
        got.append((batch, answer))
    assert got == [(0, 0), (1, 10), (2, 20)]  # and no batch beyond the last is taken
    first = [("announce", 0), ("step", 0), ("announce", 1), ("step", 1), ("announce", 2)]
    ahead = [("announce", 0), ("announce", 1), ("step", 0), ("announce", 2), ("step", 1)]
    want = first if processes == 1 else ahead
    assert events == [f"{what} {n}" for what, n in [*want, ("step", 2)]]


def test_a_process_counts_as_dead_after_the_heartbeat_only(monkeypatch):
    posted = []
    monkeypatch.setattr(watchdog, "_post", posted.append)
    monkeypatch.setattr(watchdog, "_limits", Limits(heartbeat=10))
    heard: dict[str, tuple[str, float]] = {}
    rng = random.Random(0)
    for now in range(40):
        # Process 1 is late by up to 9 s, process 2 stops at 20.
        late = str(now - rng.randrange(9)) if now % 9 == 0 else heard.get("alive/1", ("0",))[0]
        watchdog._post_silent([("alive/1", late), ("alive/2", str(min(now, 20)))], heard, now)
        assert bool(posted) == (now > 30)
    assert all(word.startswith("process 2 of 1 has given no sign of life") for word in posted)


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "experiments/launch").glob("*.sh")))
def test_launch_files_are_whole(name):
    path = ROOT / "experiments/launch" / name
    assert os.access(path, os.X_OK)
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True)])
def test_slurm_job_goes_back_into_the_queue_on_75_only(tmp_path, code, requeued):
    for name, body in (("srun", f"exit {code}"), ("scontrol", 'echo "$@" > "$OUT"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "7",
        "OUT": str(tmp_path / "out"),
    }
    done = subprocess.run(["bash", str(ROOT / "experiments/launch/slurm.sh")], env=env)
    assert done.returncode == code
    assert (tmp_path / "out").exists() == requeued


def test_a_folder_that_another_process_made_is_seen_by_all_or_refused(tmp_path, monkeypatch):
    assert distributed.make_shared_folder(tmp_path / "a", flag="--workdir").is_dir()
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    with pytest.raises(UserError, match=r"--workdir .*b was made by process 0 and is not there"):
        distributed.make_shared_folder(tmp_path / "b", flag="--workdir")
