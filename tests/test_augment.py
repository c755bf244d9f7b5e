"""Colour jitter: what leaves a picture alone, what the ends of the range mean, what it hangs on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.augment import adjust_colors, make_color_jitter
from clip_jax.mesh import make_mesh, place_batch


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(0), (8, 6, 5, 3))


def factors(images, brightness=1.0, contrast=1.0, saturation=1.0):
    return jnp.tile(jnp.array([brightness, contrast, saturation]), (len(images), 1))


def test_ones_leave_a_picture_as_it_is(images):
    out = adjust_colors(images, factors(images))
    # Grey is taken away and put back: two roundings of values below 1.
    np.testing.assert_allclose(out, images, atol=2e-7)


def test_zeros_are_black_flat_and_grey(images):
    assert not adjust_colors(images, factors(images, brightness=0.0)).any()
    flat = np.asarray(adjust_colors(images, factors(images, contrast=0.0)))
    assert np.ptp(flat, axis=(1, 2, 3)).max() == 0
    grey = np.asarray(adjust_colors(images, factors(images, saturation=0.0)))
    assert np.ptp(grey, axis=3).max() == 0 and np.ptp(grey, axis=(1, 2)).min() > 0


def test_values_stay_in_range(images):
    out = adjust_colors(images, factors(images, 2.0, 2.0, 2.0))
    assert float(out.min()) == 0 and float(out.max()) == 1


def test_draws_hang_on_seed_and_step_and_not_on_the_mesh(images):
    amounts = (0.3, 0.3, 0.3)
    jitter = jax.jit(make_color_jitter(amounts, seed=1))
    first = np.asarray(jitter(images, jnp.int32(4)))
    np.testing.assert_array_equal(first, jitter(images, jnp.int32(4)))
    assert not np.array_equal(first, jitter(images, jnp.int32(5)))
    assert not np.array_equal(first, make_color_jitter(amounts, seed=2)(images, jnp.int32(4)))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    split = jitter(place_batch({"image": np.asarray(images)}, mesh)["image"], jnp.int32(4))
    # The mean of a picture is one float32 sum of 90 values, in the compiler's order.
    np.testing.assert_allclose(split, first, atol=1e-6)
    # Each picture has its own draws.
    ratios = np.asarray(jitter(jnp.full((8, 4, 4, 3), 0.5), jnp.int32(4)))[:, 0, 0, 0]
    assert len(set(ratios.tolist())) == 8


def test_none_is_the_same_array(images):
    assert make_color_jitter((0.0, 0.0, 0.0), seed=0)(images, jnp.int32(1)) is images
