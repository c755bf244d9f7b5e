"""What a student learns from a teacher's features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.losses import distill
from clip_jax.losses.distill import (
    PairFeatures,
    affinity_loss,
    feature_distance,
    make_affinity_loss,
)
from clip_jax.parallel.mesh import AXES, BATCH_AXES, make_mesh, place_batch

B = 48


def unit_rows(seed, width, dtype):
    z_BD = np.random.default_rng(seed).normal(size=(B, width))
    return (z_BD / np.linalg.norm(z_BD, axis=1, keepdims=True)).astype(dtype)


def make_rows():
    """A student of 8 features and a teacher of 12; invalid rows hold what must not matter."""
    valid_B = np.arange(B) % 7 != 3
    z_image_BD = unit_rows(0, 8, np.float32)
    z_image_BD[~valid_B] = np.nan
    teacher = {"t_image": unit_rows(2, 12, np.float16), "t_text": unit_rows(3, 12, np.float16)}
    return {"image": z_image_BD, "text": unit_rows(1, 8, np.float32), "valid": valid_B} | teacher


def values_and_gradients(loss_fn, mesh):
    rows = place_batch(make_rows(), mesh)

    def loss(z_image_BD, z_text_BD, scale):
        teacher = PairFeatures(rows["t_image"], rows["t_text"], 30.0)
        return loss_fn(PairFeatures(z_image_BD, z_text_BD, scale), teacher, rows["valid"])

    call = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    return jax.device_get(call(rows["image"], rows["text"], jnp.float32(10.0)))


def test_the_affinity_is_the_divergence_of_softmaxes():
    rows = make_rows()
    valid_B = rows["valid"]

    def log_softmax(logits):
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    losses = []
    for image, text, t_image, t_text in (
        ("image", "text", "t_image", "t_text"),
        ("text", "image", "t_text", "t_image"),
    ):
        z = {name: rows[name][valid_B].astype(np.float64) for name in (image, text)}
        t = {name: rows[name][valid_B].astype(np.float64) for name in (t_image, t_text)}
        log_q = log_softmax(10.0 * z[image] @ z[text].T)
        log_p = log_softmax(30.0 * t[t_image] @ t[t_text].T)
        losses.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())
    student = PairFeatures(jnp.asarray(rows["image"]), jnp.asarray(rows["text"]), 10.0)
    teacher = PairFeatures(jnp.asarray(rows["t_image"]), jnp.asarray(rows["t_text"]), 30.0)
    found = affinity_loss(student, teacher, jnp.asarray(valid_B))
    np.testing.assert_allclose(found, np.mean(losses), rtol=1e-5)
    # A student that is its teacher has nothing to learn.
    assert abs(float(affinity_loss(teacher, teacher, jnp.asarray(valid_B)))) < 1e-6


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_over_a_mesh_and_in_tiles_it_is_the_same(sizes, monkeypatch):
    monkeypatch.setattr(distill, "TILE_ROWS", 4)
    one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)
    expected = values_and_gradients(affinity_loss, one)
    many = make_mesh(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    for mesh in (one, many):
        found = values_and_gradients(make_affinity_loss(mesh, BATCH_AXES), mesh)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_distance_of_features_leaves_invalid_rows_out():
    rows = make_rows()
    valid_B = rows["valid"]
    z_BD, teacher_BD = rows["image"], unit_rows(5, 8, np.float16)
    squares = (z_BD[valid_B] - teacher_BD[valid_B].astype(np.float32)) ** 2
    found = feature_distance(jnp.asarray(z_BD), jnp.asarray(teacher_BD), jnp.asarray(valid_B))
    np.testing.assert_allclose(found, squares.sum(axis=1).mean(), rtol=1e-5)
