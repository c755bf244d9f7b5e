"""Random changes on the device: color jitter and dropped patches, by the seed and the step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.parallel.mesh import make_mesh
from clip_jax.sections import DataSection, ModelSection
from clip_jax.training.device_augment import adjust_colors, make_draws


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(0), (8, 6, 5, 3))


def factors(images, brightness=1.0, contrast=1.0, saturation=1.0):
    return jnp.tile(jnp.array([brightness, contrast, saturation]), (len(images), 1))


def test_ones_leave_an_image_as_it_is(images):
    out = adjust_colors(images, factors(images))
    # Gray is taken away and put back: two roundings of values below 1.
    np.testing.assert_allclose(out, images, atol=2e-7)


def test_zeros_are_black_flat_and_gray(images):
    assert not adjust_colors(images, factors(images, brightness=0.0)).any()
    flat = np.asarray(adjust_colors(images, factors(images, contrast=0.0)))
    assert np.ptp(flat, axis=(1, 2, 3)).max() == 0
    gray = np.asarray(adjust_colors(images, factors(images, saturation=0.0)))
    assert np.ptp(gray, axis=3).max() == 0 and np.ptp(gray, axis=(1, 2)).min() > 0


def test_values_stay_in_range(images):
    out = adjust_colors(images, factors(images, 2.0, 2.0, 2.0))
    assert float(out.min()) == 0 and float(out.max()) == 1


def test_draws_depend_on_seed_and_step_and_not_on_the_mesh():
    sections = ModelSection(patch_dropout=0.5), DataSection(color_jitter=(0.3, 0.3, 0.3))
    draw = make_draws(*sections, seed=1, patches=49)
    first = draw(jnp.int32(4), 8)
    rows = NamedSharding(make_mesh(data=2, fsdp=2, tensor=2), P(("data", "fsdp")))
    split = jax.jit(lambda step: draw(step, 8), out_shardings=rows)(jnp.int32(4))
    chex.assert_trees_all_equal(split, first)
    other_seed = make_draws(*sections, seed=2, patches=49)
    others = draw(jnp.int32(5), 8), other_seed(jnp.int32(4), 8)
    for name, x in first.items():
        assert all(not np.array_equal(x, other[name]) for other in others)
        # Each image has its own draws.
        assert len(np.unique(np.asarray(x), axis=0)) == 8


def test_what_is_off_draws_nothing():
    draw = make_draws(ModelSection(), DataSection(), seed=0, patches=49)
    assert draw(jnp.int32(1), 8) == {}


@given(patches=st.integers(1, 64), share=st.floats(0.01, 0.99), step=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_patches_that_stay_are_distinct_and_of_the_promised_number(patches, share, step):
    draw = make_draws(ModelSection(patch_dropout=share), DataSection(), seed=0, patches=patches)
    patch_ids_Bl = np.asarray(draw(jnp.int32(step), 3)["patch_ids_Bl"])
    assert patch_ids_Bl.shape == (3, max(1, int(patches * (1 - share))))
    assert (
        (np.diff(patch_ids_Bl, axis=1) > 0).all()
        and patch_ids_Bl.min() >= 0
        and patch_ids_Bl.max() < patches
    )


def test_every_patch_stays_as_often_as_another():
    draw = make_draws(ModelSection(patch_dropout=0.5), DataSection(), seed=0, patches=10)
    patch_ids_Bl = np.asarray(draw(jnp.int32(0), 4000)["patch_ids_Bl"])
    counts = np.bincount(patch_ids_Bl.ravel(), minlength=10)
    # 4,000 draws at one half: a standard deviation of 32; five of them.
    assert abs(counts - 2000).max() < 160
