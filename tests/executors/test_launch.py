"""The launch files do what they say where stand-ins take the place of the cluster's programs."""

import os
import re
import subprocess

import pytest
import yaml
from run_tiny import ROOT

LAUNCH = ROOT / "experiments/launch"
STAND_INS = {
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then printf "%s\\n" node0 node1 node2; else echo "$@"; fi',
    "ray": 'echo "ray $@" >>"$OUT"; [ "$1" = status ]',
    "python": 'echo "python $@" >>"$OUT"; exit "${CODE:-0}"',
}


def run(script, args, folder, **environment):
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    env = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "OUT": str(folder / "out"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "7",
        "PYTHON": "python",
        "BIN": str(folder),
    }
    done = subprocess.run(
        ["bash", str(LAUNCH / script), *args],
        env=env | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == "" or done.returncode == 2, done.stderr
    out = folder / "out"
    return done, out.read_text().splitlines() if out.exists() else []


@pytest.mark.parametrize(("code", "printed"), [(0, ""), (2, ""), (75, "requeue 40_3\n")])
def test_an_array_task_makes_its_share_and_comes_again_on_75(tmp_path, code, printed):
    array = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}
    done, lines = run("slurm_array.sh", ["--out", "a b"], tmp_path, CODE=str(code), **array)
    assert (done.returncode, done.stdout) == (code, printed)
    assert lines == ["python -u -m clip_jax.embed --part-of 3/8 --out a b"]
    run("slurm_array.sh", [], tmp_path, OF="64", **array)
    assert "--part-of 3/64" in (tmp_path / "out").read_text()


@pytest.mark.parametrize("code", [0, 1, 75])
def test_a_ray_cluster_lives_in_a_job(tmp_path, code):
    job = {"SLURM_JOB_NODELIST": "node[0-2]", "SLURM_CPUS_PER_TASK": "4", "CODE": str(code)}
    done, lines = run("slurm_ray.sh", ["data.shard", "in", "--out", "o"], tmp_path, **job)
    assert (done.returncode, done.stdout) == (code, "requeue 7\n" if code == 75 else "")
    command = "python -u -m clip_jax.data.shard in --out o --executor ray --address node0:6379"
    assert set(lines) == {
        "ray start --head --port 6379 --num-cpus 4 --block",
        "ray status --address node0:6379",
        "ray start --address node0:6379 --num-cpus 4 --block",
        command,
    }


def test_a_ray_cluster_without_a_command_is_a_line(tmp_path):
    done, lines = run("slurm_ray.sh", [], tmp_path)
    assert done.returncode == 2 and "usage: sbatch" in done.stderr and lines == []


def test_the_jobset_counts_its_machines_once():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    shell, name, *flags = container["args"]
    processes = int(re.search(r"--num-processes (\d+)", shell)[1])
    assert job["parallelism"] == job["completions"] == processes
    assert job["completionMode"] == "Indexed" and replicated["name"] == "train"
    # As the pod's shell calls it.
    env = {"JOBSET_NAME": "x", "JOB_COMPLETION_INDEX": "2", "PATH": os.environ["PATH"]}
    shell = shell.replace("exec python", "printf '%s '")
    args = [*container["command"], shell, name, *flags]
    printed = subprocess.run(args, env=env, capture_output=True, text=True).stdout
    assert printed.startswith(
        "-u -m clip_jax.main --coordinator x-train-0-0.x:9876 --num-processes 4 --process-id 2 "
    )
    assert printed.split()[-len(flags) :] == flags


def test_skypilots_environment_becomes_the_flags():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    env = task["envs"] | {"PATH": os.environ["PATH"], "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    env |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    body = task["run"].replace(".venv/bin/python", "printf '%s '")
    printed = subprocess.run(["bash", "-c", body], env=env, capture_output=True, text=True).stdout
    assert printed == (
        "-u -m clip_jax.main --coordinator 10.0.0.1:9876 --num-processes 2 --process-id 1 "
        "--config vit_b16 --workdir /shared/runs/b16 "
        "--config.data.train=/shared/data/{00000..41455}.tar "
    )
