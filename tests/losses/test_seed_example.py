"""The softmax loss of four images and four texts, small enough to check by hand."""

import jax.numpy as jnp
import numpy as np

from clip_jax.losses.dense import cosines, softmax_loss
from clip_jax.models.clip import unit_length

IMAGES = [[0.9, 0.1, 0.0], [0.0, 0.8, 0.3], [0.1, 0.0, 0.95], [0.7, 0.3, 0.1]]
TEXTS = [[0.85, 0.15, 0.05], [0.05, 0.75, 0.35], [0.15, 0.05, 0.9], [0.6, 0.4, 0.2]]

# By hand, image i against text j: dot product over the product of lengths. The first row:
#   lengths  |0.9, 0.1, 0| = sqrt(0.82) = 0.905539,   of the texts 0.864581, 0.829156, 0.913783,
#   0.748331; dots 0.765 + 0.015 = 0.78, 0.045 + 0.075 = 0.12, 0.135 + 0.005 = 0.14, 0.54 + 0.04 =
#   0.58; and so 0.78 / (0.905539 * 0.864581) = 0.9963, and the like.
COSINES = [
    [0.9963, 0.1598, 0.1692, 0.8559],
    [0.1828, 0.9952, 0.3971, 0.5943],
    [0.1604, 0.4261, 0.9967, 0.3497],
    [0.9712, 0.4632, 0.2992, 0.9742],
]

ALL = jnp.ones(4, bool)
Z_IMAGE, Z_TEXT = (unit_length(jnp.array(x)) for x in (IMAGES, TEXTS))


def test_cosines_are_those_by_hand():
    cosine_BB = cosines(Z_IMAGE, Z_TEXT, ALL)
    np.testing.assert_allclose(cosine_BB, COSINES, atol=5.1e-5)  # half of the fourth decimal


def test_each_image_is_nearest_its_own_text_the_fourth_by_a_hair():
    cosine_BB = np.array(cosines(Z_IMAGE, Z_TEXT, ALL))
    np.testing.assert_array_equal(np.argmax(cosine_BB, axis=1), [0, 1, 2, 3])
    assert 0 < cosine_BB[3, 3] - cosine_BB[3, 0] < 0.004
    negatives = cosine_BB[:3] - np.eye(4)[:3] * 2
    assert np.all(np.diagonal(cosine_BB)[:3] - negatives.max(axis=1) > 0.14)


def test_a_higher_scale_makes_the_loss_care_about_the_near_pair():
    bias = jnp.float32(0)
    for scale in (1.0, 10.0, 100.0):
        output = softmax_loss(
            Z_IMAGE, Z_TEXT, jnp.float32(scale), bias, valid_B=ALL, caption_id_B=None
        )
        logits = scale * np.array(COSINES)
        rows = np.log(np.exp(logits).sum(1)) - np.diagonal(logits)
        columns = np.log(np.exp(logits).sum(0)) - np.diagonal(logits)
        # COSINES has four decimals: half a unit of the last, times the scale, in each logit.
        np.testing.assert_allclose(
            output.loss, (rows + columns).mean() / 2, rtol=0, atol=1e-4 * scale
        )
        assert output.image_accuracy == 1 and output.text_accuracy == 1
