"""Runs of a tiny model through the real command line, in one process or in two."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from pairs import write_data
from quick import QUICK

ROOT = Path(__file__).parent.parent
TWO = ROOT / "experiments/launch/two_processes.sh"

_EXPERIMENT = """
import dataclasses

from clip_jax.config import default
from clip_jax.models import zoo
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

zoo.MODELS["tiny"] = CLIPConfig(
    16,
    ViTConfig(image_size=32, patch_size=8, width=48, layers=1, heads=4),
    TextConfig(width=32, layers=1, heads=4, context_length=32, vocab_size=64, eot_id=63),
)


def get_config():
    c = default()
    c.model.name = "tiny"
    c.train.batch_size = 16
    c.train.mask_equal_captions = True
    c.train.log_every = 1
    c.optim.learning_rate = 1e-3
    c.optim.warmup_steps = 2
    c.data.train = "{pattern}"
    c.data.tokenizer = "{folder}/t.model"
    c.data.threads = 2
    return c
"""


def write_experiment(folder: Path, **pairs) -> Path:
    """Write data, a tokenizer, and an experiment file that names them; return the last."""
    _, pattern = write_data(folder, **pairs)
    path = folder / "experiment.py"
    text = _EXPERIMENT.replace("{pattern}", pattern).replace("{folder}", str(folder))
    path.write_text(text)
    return path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    """Return the environment of a process with this many devices; it shares the tests' cache."""
    flags = f"{QUICK} --xla_force_host_platform_device_count={devices}"
    # Unbuffered, so that a test can wait for a line.
    values = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    # pytest says where the tests' helpers lie; a user's process knows only the package.
    return {key: value for key, value in values.items() if not key.startswith("PYTEST")}


def command(experiment: Path, workdir: Path, *args: str) -> list[str]:
    return ["--config", str(experiment), "--workdir", str(workdir), *args]


def run_one(
    experiment: Path, workdir: Path, *args: str, devices: int = 8
) -> subprocess.CompletedProcess:
    """Run one process to its end."""
    return run_module("clip_jax.main", *command(experiment, workdir, *args), devices=devices)


def run_module(name: str, *args: str, devices: int = 8) -> subprocess.CompletedProcess:
    """Run another command to its end."""
    line = [sys.executable, "-m", name, *args]
    return subprocess.run(line, cwd=ROOT, env=environment(devices), capture_output=True, text=True)


def run_two(
    experiment: Path, workdir: Path, *args: str, devices: int = 4
) -> subprocess.CompletedProcess:
    """Run two processes, as `two_processes.sh` starts them, to their end."""
    extra = {"PYTHON": sys.executable, "DEVICES": str(devices), "PORT": str(free_port())}
    return subprocess.run(
        ["bash", str(TWO), *command(experiment, workdir, *args)],
        cwd=ROOT,
        env={**environment(devices), **extra},
        capture_output=True,
        text=True,
        timeout=600,  # a hang is a failure
    )


def start_two(
    experiment: Path, workdir: Path, *args: str, second: tuple[str, ...] = (), devices: int = 2
) -> list[subprocess.Popen]:
    """Start two processes that a test can signal one by one; each writes to `workdir`.N.log.

    `second` are arguments of the second process only.
    """
    port, processes = free_port(), []
    for index in range(2):
        line = [sys.executable, "-m", "clip_jax.main", "--coordinator", f"localhost:{port}"]
        line += ["--num-processes", "2", "--process-id", str(index)]
        with log(workdir, index).open("w") as out:
            process = subprocess.Popen(
                [*line, *command(experiment, workdir, *args, *(second if index else ()))],
                cwd=ROOT,
                env=environment(devices),
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        processes.append(process)
    return processes


def log(workdir: Path, index: int) -> Path:
    return workdir.with_name(f"{workdir.name}.{index}.log")
