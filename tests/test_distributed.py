"""Several processes as one run, by the real command line on loopback, and the parts of it alone."""

import collections
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from run_tiny import ROOT, log, losses, one, start_two, two, write_experiment

from clip_jax import distributed, train
from clip_jax.errors import EXIT_ERROR, EXIT_TERMINATED, EXIT_USAGE, UserError
from clip_jax.mesh import AXES, batch_part, make_mesh
from clip_jax.models.clip import CLIP
from clip_jax.models.zoo import model_config
from clip_jax.optim import make_optimizer
from clip_jax.state import device_bytes, init_variables, make_state, state_shapes

FSDP = "--config.mesh.fsdp=8"  # over both processes


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return write_experiment(tmp_path_factory.mktemp("pairs"))


def assert_same_losses(a, b, rtol):
    a, b = losses(a), losses(b)
    assert [step for step, _ in a] == [step for step, _ in b]
    np.testing.assert_allclose([x for _, x in a], [x for _, x in b], rtol=rtol)


def told(text: str) -> list[str]:
    """The lines of a process, without Gloo's about its own connections."""
    return [line for line in text.splitlines() if line and not line.startswith("[Gloo]")]


def test_two_processes_train_as_one_and_one_goes_on(experiment, tmp_path):
    done = two(experiment, tmp_path / "two", FSDP, "--config.train.steps=3")
    assert done.returncode == 0, done.stderr
    # Process 0 alone speaks: every line is there once.
    lines = told(done.stdout)
    assert [line for line in lines if line.startswith("step 3/3")] == lines[-1:]
    assert len(lines) == 5 and not told(done.stderr), (lines, done.stderr)
    assert len(list((tmp_path / "two").glob("events.out.tfevents.*"))) == 1

    alone = one(experiment, tmp_path / "one", FSDP, "--config.train.steps=3")
    assert alone.returncode == 0, alone.stderr
    # The same programs with sums between devices in another order.
    assert_same_losses(tmp_path / "two", tmp_path / "one", 1e-5)
