"""What the doctor says of a machine."""

import errno
import os

import jax
import pytest

from clip_jax.diagnosis import machine
from clip_jax.diagnosis.machine import look_at_devices, look_at_file_system, look_at_machine
from clip_jax.diagnosis.training_step import try_training


def test_a_folder_that_can_do_all_is_left_as_it_was(tmp_path):
    found = look_at_file_system(tmp_path / "not" / "there")
    assert found.folder == str(tmp_path) and list(tmp_path.iterdir()) == []
    assert found.writes and found.syncs and found.locks and found.renames


@pytest.mark.parametrize(
    ("module", "function", "field"), [("fcntl", "flock", "locks"), ("os", "fsync", "syncs")]
)
def test_what_a_file_system_does_not_give(tmp_path, monkeypatch, module, function, field):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(getattr(machine, module), function, refuse)
    found = look_at_file_system(tmp_path)
    assert found.writes and not getattr(found, field)
    assert any(str(tmp_path) in line and "not supported" in line for line in found.problems)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "mkdtemp", refuse)
    found = look_at_file_system(tmp_path)
    assert not (found.writes or found.syncs or found.locks or found.renames)
    assert "Permission denied" in found.problems[0]


def test_devices(monkeypatch):
    found = look_at_devices(plugins=False)
    assert (found.platform, found.count, found.problems) == ("cpu", 8, ())
    # A plug-in that JAX does not take is told, unless the CPU was asked for.
    assert look_at_devices(plugins=True).problems == ()
    monkeypatch.delenv("JAX_PLATFORMS")
    assert "nvidia-smi" in look_at_devices(plugins=True).problems[0]


def test_the_machine_has_cores_and_memory():
    found = look_at_machine()
    assert 1 <= found.cores <= (os.cpu_count() or 1) and found.memory_bytes >= found.free_bytes


@pytest.mark.slow
def test_a_tiny_model_trains():
    steps = try_training(jax.devices()[:1])
    assert steps.problems == () and steps.last_loss < steps.first_loss
