"""Eight virtual CPU devices for every test, set before JAX starts its backend."""

import os
import tempfile

import pytest
from checked_rooms import CHECKED
from hypothesis import settings
from jaxtyping import install_import_hook
from quick import QUICK

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK}"
os.environ["JAX_PLATFORMS"] = "cpu"
# A program that several tests share is compiled once; pytest-xdist's workers inherit the folder.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="clip_jax_test_programs_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
# The files of tests need not outlast a loss of power, and a busy disk takes a while for each.
os.fsync = lambda descriptor: None
# A busy machine takes its time for a case.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


def check_devices() -> None:
    import jax

    if jax.device_count() != 8:
        raise RuntimeError(
            f"tests need 8 virtual CPU devices and found {jax.device_count()}: "
            "JAX was started before tests/conftest.py could set XLA_FLAGS"
        )


check_devices()
install_import_hook(
    [f"clip_jax.{room}" for room in CHECKED],
    "beartype.beartype",
)


@pytest.fixture(autouse=True)
def notes_are_printed(monkeypatch):
    """A worker mutes the notes of its process, which in tests is theirs."""
    monkeypatch.setattr("clip_jax.errors._muted", False)
