"""The update that the copies of the model share (ZeRO stage 1) is the whole update."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from steps import make_parts, one_device_mesh, run
from tiny import SHALLOW as VIT

from clip_jax.models.clip import CLIP
from clip_jax.models.target import Target
from clip_jax.parallel.mesh import make_mesh
from clip_jax.parallel.sharding import update_spec
from clip_jax.sections import OptimSection
from clip_jax.training.setup import splits_update
from clip_jax.training.state import device_bytes


@pytest.fixture
def small(monkeypatch):
    """Split arrays of a tiny model too."""
    monkeypatch.setattr("clip_jax.parallel.sharding.SMALL", 64)


@pytest.mark.parametrize(
    "shape", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 2, 2)], ids=str
)
def test_a_shared_update_gives_one_devices_losses(small, shape):
    mesh = make_mesh(**dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))
    state, metrics, losses = run(VIT, mesh, split_update=True)
    _, plain, want = run(VIT, one_device_mesh())
    # float32 sums in another order, as on every mesh (test_step.py).
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], plain["grad_norm"], rtol=1e-4)
    kept = [x.sharding.spec for x in jax.tree.leaves(state.params)]
    assert not any("data" in spec for spec in kept)


def test_each_copy_keeps_its_part_of_the_optimizers_state(small):
    mesh = make_mesh(data=8, fsdp=1, tensor=1)
    whole, split = (
        make_parts(CLIP(VIT), mesh, split_update=split)[2].opt_state for split in (False, True)
    )
    assert device_bytes(split) < device_bytes(whole) / 4


def test_what_is_split():
    mesh = make_mesh(data=4, fsdp=2, tensor=1)
    name = "opt_state/mu/text/transformer/resblocks/mlp/c_fc/kernel"
    assert update_spec(name, (4, 512, 2048), mesh) == P(None, "fsdp", "data")
    assert update_spec("params/visual/ln_pre/scale", (512,), mesh) == P("fsdp")
    assert update_spec("params/text/positional_embedding", (77, 1002), mesh) == P(None, "fsdp")
    small = update_spec("params/visual/layer3/conv", (3, 3, 256, 256), mesh)
    assert small == P(None, None, "fsdp", None)
    large = update_spec("params/visual/layer4/conv", (3, 3, 512, 512), mesh)
    assert large == P(None, None, "fsdp", "data")


def test_auto_is_on_for_accelerators_where_each_number_is_updated_by_itself():
    assert splits_update(OptimSection(), Target("tpu"))
    assert splits_update(OptimSection(name="lion"), Target("cuda"))
    assert not splits_update(OptimSection(name="muon"), Target("tpu"))
    assert not splits_update(OptimSection(), Target("cpu"))
    assert splits_update(OptimSection(split="on"), Target("cpu"))
    assert not splits_update(OptimSection(split="off"), Target("tpu"))
