"""A run has one loss on one, two and four devices, as far as it does not amplify rounding."""

import sys

import numpy as np
import pytest
from pairs import run_losses
from run_tiny import run_one, write_experiment

DEVICES = (1, 2, 4)


def losses(experiment, workdir, devices, *flags):
    """Return the losses of 60 steps that begin at a rate and fall along the cosine."""
    flags = ("--config.train.steps=60", "--config.optim.warmup_steps=0", *flags)
    done = run_one(experiment, workdir, *flags, devices=devices)
    assert done.returncode == 0, done.stderr
    found = run_losses(workdir)
    assert [step for step, _ in found] == list(range(1, 61))
    return np.array([loss for _, loss in found])


def differences(experiment, folder, *flags):
    """Return the relative differences of 2 and 4 devices' losses from one's, [2, 60]."""
    one, *others = (losses(experiment, folder / str(n), n, *flags) for n in DEVICES)
    return np.abs(np.array(others) / one - 1)


@pytest.mark.slow
def test_sixty_steps_at_a_small_rate_agree_on_one_two_and_four_devices(tmp_path):
    experiment = write_experiment(tmp_path / "data")
    apart = differences(experiment, tmp_path, "--config.optim.learning_rate=1e-4")
    print(f"first step {apart[:, 0].max():.1e}, largest {apart.max():.1e}", file=sys.stderr)
    assert apart[:, 0].max() < 1e-6 and apart.max() < 1e-5
