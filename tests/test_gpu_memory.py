"""The share of a GPU's memory: the plan's, unless the user says another."""

import pytest
from jaxlib import xla_client

from clip_jax.gpu_memory import SHARE, VARIABLES, take_gpu_memory
from clip_jax.planning.estimate import USABLE


@pytest.mark.parametrize("given", [None, *VARIABLES])
def test_jaxlib_takes_the_share(monkeypatch, given):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # what is set below goes with the test
    if given:
        monkeypatch.setenv(given, "0.25")
    take_gpu_memory()
    options = xla_client.generate_pjrt_gpu_plugin_options()
    assert options["memory_fraction"] == (0.25 if given else SHARE) and SHARE == USABLE
