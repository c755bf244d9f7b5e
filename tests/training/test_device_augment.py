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
from clip_jax.training.device_augment import (
    ERASING_MODES,
    adjust_colors,
    drop_path_rates,
    erase_boxes,
    make_draws,
)


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
    sections = (
        ModelSection(patch_dropout=0.5, drop_path=0.9, text_drop_path=0.9),
        DataSection(color_jitter=(0.3, 0.3, 0.3), random_erasing=0.5, erasing_mode="pixel"),
    )
    draw = make_draws(*sections, seed=1, patches=49, layers=12, text_layers=12)
    first = draw(jnp.int32(4), 8)
    rows = NamedSharding(make_mesh(data=2, fsdp=2, tensor=2), P(("data", "fsdp")))
    split = jax.jit(lambda step: draw(step, 8), out_shardings=rows)(jnp.int32(4))
    chex.assert_trees_all_equal(split, first)
    other_seed = make_draws(*sections, seed=2, patches=49, layers=12, text_layers=12)
    others = draw(jnp.int32(5), 8), other_seed(jnp.int32(4), 8)
    for name, x in first.items():
        assert all(not np.array_equal(x, other[name]) for other in others)
        # Each image has its own draws.
        assert name == "erase_B" or len(np.unique(np.asarray(x), axis=0)) == 8


def test_what_is_off_draws_nothing():
    draw = make_draws(ModelSection(), DataSection(), seed=0, patches=49, layers=0, text_layers=0)
    assert draw(jnp.int32(1), 8) == {}


@given(patches=st.integers(1, 64), share=st.floats(0.01, 0.99), step=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_patches_that_stay_are_distinct_and_of_the_promised_number(patches, share, step):
    draw = make_draws(
        ModelSection(patch_dropout=share),
        DataSection(),
        seed=0,
        patches=patches,
        layers=0,
        text_layers=0,
    )
    patch_ids_Bl = np.asarray(draw(jnp.int32(step), 3)["patch_ids_Bl"])
    assert patch_ids_Bl.shape == (3, max(1, int(patches * (1 - share))))
    assert (
        (np.diff(patch_ids_Bl, axis=1) > 0).all()
        and patch_ids_Bl.min() >= 0
        and patch_ids_Bl.max() < patches
    )


def test_every_patch_stays_as_often_as_another():
    draw = make_draws(
        ModelSection(patch_dropout=0.5),
        DataSection(),
        seed=0,
        patches=10,
        layers=0,
        text_layers=0,
    )
    patch_ids_Bl = np.asarray(draw(jnp.int32(0), 4000)["patch_ids_Bl"])
    counts = np.bincount(patch_ids_Bl.ravel(), minlength=10)
    # 4,000 draws at one half: a standard deviation of 32; five of them.
    assert abs(counts - 2000).max() < 160


def test_a_setting_moves_no_draw_of_another():
    alone = make_draws(
        ModelSection(patch_dropout=0.5),
        DataSection(),
        seed=1,
        patches=9,
        layers=4,
        text_layers=4,
    )
    data = DataSection(color_jitter=(0.3, 0.3, 0.3), random_erasing=0.5)
    both = make_draws(
        ModelSection(patch_dropout=0.5, drop_path=0.5),
        data,
        seed=1,
        patches=9,
        layers=4,
        text_layers=4,
    )
    name = "patch_ids_Bl"
    np.testing.assert_array_equal(both(jnp.int32(3), 8)[name], alone(jnp.int32(3), 8)[name])


@pytest.mark.parametrize("mode", ERASING_MODES)
def test_a_box_of_each_chosen_image_is_erased(mode):
    data = DataSection(random_erasing=0.5, erasing_mode=mode)
    draws = make_draws(ModelSection(), data, seed=0, patches=0, layers=0, text_layers=0)(
        jnp.int32(2), 64
    )
    images = jnp.full((64, 20, 30, 3), 7.0)
    out = np.asarray(erase_boxes(images, draws))
    erased = (out != 7).all(axis=3)
    np.testing.assert_array_equal(erased.any(axis=(1, 2)), draws["erase_B"])
    for k in np.flatnonzero(draws["erase_B"]):
        rows, columns = erased[k].any(axis=1), erased[k].any(axis=0)
        assert (erased[k] == rows[:, None] & columns[None]).all()  # a box, and one alone
        assert (np.diff(np.flatnonzero(rows)) == 1).all()
        assert 0.01 < erased[k].mean() < 0.36
        colors = len(np.unique(out[k][erased[k]], axis=0))
        assert colors == (erased[k].sum() if mode == "pixel" else 1)
    if mode == "const":
        assert set(np.unique(out)) == {0, 7}


def test_paths_are_dropped_at_the_rates_of_their_blocks_and_keep_the_mean():
    model = ModelSection(drop_path=0.6)
    draw = make_draws(model, DataSection(), seed=0, patches=0, layers=4, text_layers=4)
    scale_BK2 = np.asarray(draw(jnp.int32(0), 4000)["path_scale_BK2"])
    rates = np.asarray(drop_path_rates(0.6, 4))
    np.testing.assert_allclose(rates, [0, 0.2, 0.4, 0.6], atol=1e-6)
    np.testing.assert_allclose((scale_BK2 == 0).mean(axis=(0, 2)), rates, atol=0.03)
    np.testing.assert_allclose(scale_BK2.mean(axis=(0, 2)), 1, atol=0.05)
    assert (scale_BK2[:, 0] == 1).all()
