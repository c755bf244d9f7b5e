"""RandAugment's operations, and its draws, which move no other."""

import itertools

import data_cases
import numpy as np
import pytest
from data_cases import make_image, train_loader
from hypothesis import given
from hypothesis import strategies as st

from clip_jax.data.order import Uniforms
from clip_jax.data.rand_augment import OPERATIONS, STRENGTHS, magnitude_of, rand_augment
from clip_jax.data.sources import open_shards

IMAGE = make_image("RGB", 33, 29)


def test_strength_0_leaves_an_image_as_it_is():
    for name, operation in OPERATIONS.items():
        # Two have no strength, and of solarize only white is turned then, as by torchvision.
        if name in ("autocontrast", "equalize", "solarize"):
            continue
        assert operation.apply(IMAGE, magnitude_of(name, 0, IMAGE.size)).tobytes() == (
            IMAGE.tobytes()
        ), name


@given(strength=st.integers(0, STRENGTHS - 1), seed=st.integers(0, 100))
def test_size_and_mode_stay_and_every_operation_takes_two_draws(strength, seed):
    class Counted(Uniforms):
        count = 0

        def random(self):
            self.count += 1
            return super().random()

    rng = Counted(seed, 1)
    out = rand_augment(IMAGE, 3, strength, rng)
    assert out.size == IMAGE.size and out.mode == "RGB" and rng.count == 6


def test_all_operations_are_drawn_alike_and_half_are_negative():
    rng, counts, signs = Uniforms(0, 1), dict.fromkeys(OPERATIONS, 0), []
    for _ in range(2800):
        counts[list(OPERATIONS)[int(rng.random() * len(OPERATIONS))]] += 1
        signs.append(rng.random() < 0.5)
    assert all(140 < count < 260 for count in counts.values())
    assert 0.45 < np.mean(signs) < 0.55


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return open_shards(data_cases.write_shards(folder, [13, 19], side=12))


def take(shards, **options):
    options = {"crop_scale": (0.3, 1.0), "flip": 0.5, "streams": 2} | options
    with train_loader(shards, **options) as loader:
        return np.stack([batch["image"] for batch in itertools.islice(loader, 4)])


def test_training_images_are_changed_behind_the_crop_and_flip(shards):
    plain = take(shards)
    changed = take(shards, rand_augment=2, rand_augment_magnitude=20)
    share = (plain != changed).any(axis=(2, 3, 4)).mean()
    assert 0.8 < share < 1.0  # twice the identity is rare
    np.testing.assert_array_equal(take(shards, rand_augment=2, rand_augment_magnitude=20), changed)
    # Another strength has the same operations on the same crops.
    weak = take(shards, rand_augment=2, rand_augment_magnitude=0)
    assert (weak == plain).all(axis=(2, 3, 4)).mean() > 0.6
