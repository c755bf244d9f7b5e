"""Checkpoints: the same bits on any mesh, damage found and set aside, other runs refused."""

import json
import random
import shutil
import sys
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VIT

from clip_jax.errors import UserError
from clip_jax.models.clip import CLIP
from clip_jax.parallel.mesh import make_mesh
from clip_jax.sections import OptimSection, TrainSection
from clip_jax.training.checkpoint import DIGEST, Checkpoints, tree_digests
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.save_errors import mute_orbax, saving
from clip_jax.training.state import init_state, state_shapes

MODEL = CLIP(VIT)
TRAIN = TrainSection()
OPTIMIZER = make_optimizer(lambda step: 1e-3, OptimSection())


@pytest.fixture(scope="module")
def shapes():
    return state_shapes(MODEL, OPTIMIZER, make_mesh(data=2, fsdp=2, tensor=2), TRAIN)


@pytest.fixture(scope="module")
def state(shapes):
    state = init_state(MODEL, OPTIMIZER, shapes, TRAIN, seed=0)
    # Moments that are not zero, so that a lost one would show.
    return state.replace(opt_state=jax.tree.map(lambda x: x + 1, state.opt_state))


def test_restores_the_same_bits_on_another_mesh(tmp_path, state):
    saver = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        saver.save(state.replace(step=jnp.int32(step)), step, {"config.seed": 0})
    assert saver.steps() == [3, 2]
    saver.close()
    other = state_shapes(MODEL, OPTIMIZER, make_mesh(data=8, fsdp=1, tensor=1), TRAIN)
    reader = Checkpoints(tmp_path)
    restored, meta = reader.restore(other)
    reader.close()
    assert meta["step"] == 3 and meta["fingerprint"] == {"config.seed": 0}
    chex.assert_trees_all_equal(restored, state.replace(step=jnp.int32(3)), strict=True)
    for x, shape in zip(jax.tree.leaves(restored), jax.tree.leaves(other), strict=True):
        assert x.sharding.is_equivalent_to(shape.sharding, x.ndim)


def test_nothing_saved_yet(tmp_path, shapes):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(shapes) is None and checkpoints.latest_meta() is None
    checkpoints.close()


def flip_a_bit(path, rng):
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "meta"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(
    tmp_path, state, shapes, damage, capsys
):
    saver = Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        saver.save(state.replace(step=jnp.int32(step)), step, {})
    saver.close()
    folder = tmp_path / "checkpoints" / "2"
    # Which of the files hold what is read is the library's choice: all are damaged.
    files = [p for p in (folder / "model").rglob("*") if p.is_file()]
    rng = random.Random(0)
    for path in files:
        if damage == "flip":
            flip_a_bit(path, rng)
        elif damage == "cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif damage == "missing":
            path.unlink()
    if damage == "meta":
        (folder / "meta" / "metadata").write_text("{")
    reader = Checkpoints(tmp_path, keep=3)
    restored, meta = reader.restore(shapes)
    assert meta["step"] == 1 and reader.steps() == [1]
    reader.close()
    chex.assert_trees_all_equal(restored, state.replace(step=jnp.int32(1)), strict=True)
    assert (tmp_path / "quarantine" / "2").is_dir()
    assert "checkpoint 2 is damaged and moved to" in capsys.readouterr().out


def test_all_damaged_is_one_line(tmp_path, state, shapes):
    saver = Checkpoints(tmp_path)
    saver.save(state, 1, {})
    saver.close()
    (tmp_path / "checkpoints" / "1" / "meta" / "metadata").unlink()
    reader = Checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"none of the 1 checkpoints .* can be read"):
        reader.restore(shapes)
    reader.close()


@pytest.mark.parametrize(
    ("total", "free", "fits"), [(100, 1, False), (100, 99, True), (0, 0, True)]
)
def test_a_full_disk_is_one_line_before_anything_is_written(
    tmp_path, state, monkeypatch, total, free, fits
):
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    disk = shutil.disk_usage(tmp_path)._replace(total=total * size, free=free * size - (not fits))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    saver = Checkpoints(tmp_path)
    if fits:
        saver.save(state, 1, {})
    else:
        with pytest.raises(UserError, match=r"a checkpoint is .* MB and .* make room and run the"):
            saver.save(state, 1, {})
    assert saver.steps() == ([1] if fits else [])
    saver.close()


def test_a_save_that_fails_is_one_line(tmp_path, monkeypatch):
    """Of a full disk TensorStore and Orbax print hundreds; the campaign of faults fills it."""
    text = 'OUT_OF_RANGE: Error writing "a/0" in OCDBT database: Failed writing: "d/1": Failed to'
    text += " write 4558 bytes to file 7: File too large [os_error_code='27']"
    line = (
        r"^a checkpoint in .* cannot be written \(File too large\); those before it stay; make room"
    )
    with pytest.raises(UserError, match=line), saving(tmp_path):
        raise ValueError(text)
    right = r"Permission denied.*; give yourself the right to write"
    with pytest.raises(UserError, match=right), saving(tmp_path):
        raise PermissionError(13, "Permission denied")
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    mute_orbax.__wrapped__()

    async def async_serialize_from_host():
        pass

    coroutine = async_serialize_from_host()
    coroutine.close()
    monkeypatch.setattr(coroutine, "__qualname__", "async_serialize_from_host.write_fragment")
    closed, other = RuntimeError("Event loop is closed"), RuntimeError("another")
    for error, thing in ((closed, None), (ImportError("x"), coroutine), (other, None)):
        sys.unraisablehook(SimpleNamespace(exc_type=type(error), exc_value=error, object=thing))
    assert [args.exc_value for args in told] == [other]


@pytest.fixture(scope="module")
def saved_twice(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("twice")
    saver = Checkpoints(folder, keep=2)
    for step in (1, 2):
        saver.save(state, step, {"seed": 3, "sizes": (1, 2)})
    saver.close()
    return folder


def test_earlier_digests_are_verified_by_their_own_version(tmp_path, state, shapes):
    saver = Checkpoints(tmp_path, keep=2)
    saver.save(state, 1, {})
    saver.steps()
    path = tmp_path / "checkpoints" / "1" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    items = {"model": {"params": state.params, "batch_stats": state.batch_stats}}
    items["train"] = {"step": state.step, "opt_state": state.opt_state}
    del meta["check"], meta["digest"]
    path.write_text(json.dumps(meta | {"digests": tree_digests(items)}))
    assert saver.restore(shapes)[1]["step"] == 1
    saver.close()


def test_what_is_not_finite_is_not_saved(tmp_path, state):
    saver = Checkpoints(tmp_path)
    saver.save(state, 1, {})
    scale = state.params["logit_scale"] + jnp.inf
    spoiled = state.replace(params={**state.params, "logit_scale": scale})
    with pytest.raises(
        UserError, match=r"step 2 is not finite, first in model/.*logit_scale, .* 1 "
    ):
        saver.save(spoiled, 2, {})
    assert saver.steps() == [1]
    saver.close()


def test_other_arrays_are_not_taken_for_damage(tmp_path, state, shapes):
    saver = Checkpoints(tmp_path)
    saver.save(state, 1, {})
    other = make_optimizer(lambda step: 1e-3, OptimSection(weight_decay=0.0, clip_norm=1.0))
    assert saver.restore(state_shapes(MODEL, other, shapes.step.sharding.mesh, TRAIN)) is not None
    with pytest.raises(UserError, match="other arrays than this model and optimizer"):
        saver.restore(shapes.replace(opt_state={"momentum": shapes.step}))
    assert saver.steps() == [1]
    saver.close()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 11), st.integers(0, 31))
def test_digest_sees_every_bit(place, bit):
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    bits = x.view(np.uint32).copy()
    bits.reshape(-1)[place] ^= np.uint32(1 << bit)
    for version in (1, 2):
        damaged = tree_digests({"x": bits.view(np.float32)}, version)
        assert tree_digests({"x": x}, version) != damaged


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 11), min_size=2, max_size=12))
def test_digest_sees_signs_that_flip_together(places):
    x = np.linspace(-1, 1, 12, dtype=np.float32)
    flipped = x.copy()
    flipped[list(places)] *= -1
    assert tree_digests({"x": x}, DIGEST) != tree_digests({"x": flipped}, DIGEST)


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_of_meta_falls_back_to_the_checkpoint_before(saved_twice, place, bit):
    """Whichever it is: none of them makes the run another, or stops it."""
    path = saved_twice / "checkpoints" / "2" / "meta" / "metadata"
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[int(place * len(whole))] ^= 1 << bit
    path.write_bytes(damaged)
    reader = Checkpoints(saved_twice, read_only=True)
    try:
        meta = reader.latest_meta()
        assert meta["step"] == 1 or meta == json.loads(whole)
        assert meta["fingerprint"] == {"seed": 3, "sizes": [1, 2]}
    finally:
        reader.close()
        path.write_bytes(whole)


def test_digest_does_not_depend_on_the_sharding():
    x = jax.random.normal(jax.random.key(0), (16, 8))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    specs = [("data", None), (None, "fsdp"), (("data", "fsdp"), "tensor")]
    digests = {
        tree_digests(jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec))))[""] for spec in specs
    }
    assert len(digests) == 1
