"""Random inputs and parameters of the tiny models, and what a test compares of two models."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
from tiny import SIGLIP, TEXT, TINY

from clip_jax.models.clip import CLIP, init_variables, variable_shapes
from clip_jax.typing import path_name

# As the others, with three blocks where they have two: a stack of one would hide its axis.
DEEP = {
    **TINY,
    "siglip": dataclasses.replace(
        SIGLIP, vision=dataclasses.replace(SIGLIP.vision, layers=3), text=TEXT
    ),
}


def make_tokens(rng: np.random.Generator, batch: int, length: int = 24) -> np.ndarray:
    """Return random captions of every length that fits, padded with 0 behind the end token."""
    tokens = np.zeros((batch, length), np.int32)
    for row in tokens:
        end = rng.integers(1, length)
        row[:end] = rng.integers(1, TEXT.eot_id, end)
        row[end] = TEXT.eot_id
    return tokens


def make_inputs(config, batch=4):
    """Return random normalized images and tokens for a model of this config."""
    rng = np.random.default_rng(1)
    size = config.vision.image_size
    images = rng.standard_normal((batch, size, size, 3)).astype(np.float32)
    return jnp.asarray(images), jnp.asarray(make_tokens(rng, batch))


def first_variables(config):
    """Return the variables that training starts from."""
    return jax.jit(lambda: init_variables(CLIP(config), 0))()


def random_variables(config, seed=0):
    """Return variables of a config, with biases that are not zero and gains that are not one."""
    rng = np.random.default_rng(seed)
    bound = {"kernel": 0.1, "embedding": 0.1}

    def draw(path, x):
        name = path_name(path).split("/")[-1]
        x = rng.uniform(-1, 1, x.shape).astype(np.float32) * bound.get(name, 0.2)
        return jnp.asarray(x + (name in ("scale", "var", "gamma")))

    return jax.tree_util.tree_map_with_path(draw, variable_shapes(CLIP(config)))


def weighted_sum(features):
    """Return a number that depends on every entry of both towers' features."""
    z_image, z_text = features
    weights = jnp.cos(jnp.arange(z_image.size, dtype=jnp.float32)).reshape(z_image.shape)
    return jnp.sum(weights * (z_image + 2 * z_text))


def features_and_gradients(model, variables, *inputs, **options):
    """Return what a model gives, and the gradients of its features' weighted sum.

    `options` are the model's; with `mutable` it gives (features, updated collections).
    """

    def total(params):
        output = model.apply({**variables, "params": params}, *inputs, **options)
        return weighted_sum(output[0] if "mutable" in options else output), output

    (_, output), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(variables["params"])
    return output, grads


def assert_trees_close(actual, expected, rtol=2e-5, atol=1e-6):
    """Assert that each array is within `rtol` of the other in norm.

    2e-5: float32 sums in another order, some tens of epsilons (1.2e-7); projecting the radial part
    out of a unit vector's gradient cancels about one digit more. `atol`: a key's bias has no
    gradient in exact arithmetic, where only rounding is left.
    """

    def error_and_norm(x, y):
        return float(jnp.linalg.norm(x - y)), float(jnp.linalg.norm(y))

    def close(x, y):
        error, norm = error_and_norm(x, y)
        return error <= rtol * norm + atol

    def message(x, y):
        return "an error of {} in norm against a norm of {}".format(*error_and_norm(x, y))

    chex.assert_trees_all_equal_comparator(close, message, actual, expected)
