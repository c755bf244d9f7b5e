"""A run's start replaces kernels that are wrong on the chip, and says so."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from tiny import VIT

from clip_jax.models.clip import CLIP
from clip_jax.models.kernels import check
from clip_jax.models.target import Target
from clip_jax.sections import Config
from clip_jax.training import kernel_check


@dataclasses.dataclass(frozen=True)
class Run:
    """What the check reads of a run."""

    model: CLIP
    config: Config
    caption_packing: None = None


def make_run(platform):
    return Run(CLIP(VIT, dtype=jnp.bfloat16, target=Target(platform, "v5e")), Config())


class MosaicError(Exception):
    """What JAX makes of an error that tells a place in a kernel: of no type of its own errors."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (3.0, "by 3.0 times bfloat16's rounding"),
        (math.nan, "not finite"),
        (jax.errors.JaxRuntimeError("Mosaic failed"), "JaxRuntimeError: Mosaic failed"),
        (MosaicError("not\nthere"), "MosaicError: not there"),
        (NotImplementedError("a layout"), "NotImplementedError: a layout"),
    ],
)
def test_wrong_kernels_are_replaced_in_a_line(monkeypatch, capsys, error, words):
    def kernels_error(**sizes):
        assert (sizes["length"], sizes["is_causal"]) == (24, True)
        if isinstance(error, Exception):
            raise error
        return error

    monkeypatch.setattr(check, "kernels_error", kernels_error)
    assert kernel_check.with_checked_kernels(make_run("tpu")).model.attention == "xla"
    line = capsys.readouterr().out
    assert words in line and line.endswith("please report this line\n") and line.count("\n") == 1


def test_right_kernels_stay(monkeypatch, capsys):
    monkeypatch.setattr(check, "kernels_error", lambda **_: 1.0)
    run = make_run("tpu")
    assert kernel_check.with_checked_kernels(run) is run
    assert not capsys.readouterr().out


def test_other_platforms_compute_nothing(monkeypatch):
    monkeypatch.setattr(check, "kernels_error", SimpleNamespace())
    run = make_run("cuda")
    assert kernel_check.with_checked_kernels(run) is run
