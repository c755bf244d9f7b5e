"""Blocks stacked for a loop and one by one: the same model, and checkpoints that go both ways."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import assert_trees_close, features_and_gradients, make_tokens
from tiny import SIGLIP, TEXT, TINY

from clip_jax.models.clip import CLIP, unrolled
from clip_jax.models.stack import stack_layers, unstack_layers
from clip_jax.state import init_variables
from clip_jax.typing import path_name

# As the others, with three blocks where they have two: a stack of one would hide its axis.
DEEP = {
    **TINY,
    "siglip": dataclasses.replace(
        SIGLIP, vision=dataclasses.replace(SIGLIP.vision, layers=3), text=TEXT
    ),
}


def names(tree):
    return {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True)


def random_variables(config, seed=0):
    """As the first start, with biases that are not zero and gains that are not one."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_variables(CLIP(config), 0))
    scale = {"kernel": 0.1, "embedding": 0.1}

    def draw(path, x):
        name = path_name(path).split("/")[-1]
        x = rng.uniform(-1, 1, x.shape).astype(np.float32) * scale.get(name, 0.2)
        return jnp.asarray(x + (name in ("scale", "var", "gamma")))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def inputs(config, batch=4):
    rng = np.random.default_rng(1)
    size = config.vision.image_size
    images = rng.standard_normal((batch, size, size, 3)).astype(np.float32)
    return jnp.asarray(images), jnp.asarray(make_tokens(rng, batch))


@pytest.mark.parametrize("name", DEEP)
def test_a_stacked_model_has_the_stacked_parameters(name):
    config = DEEP[name]
    model = CLIP(config, scan=True)
    plain = jax.eval_shape(lambda: init_variables(unrolled(model), 0))
    stacked = jax.eval_shape(lambda: init_variables(model, 0))
    assert jax.eval_shape(stack_layers, plain) == stacked
    assert jax.eval_shape(unstack_layers, stacked) == plain


@pytest.mark.parametrize("name", ["vit", "clipa", "siglip"])
@pytest.mark.parametrize("read_early", [True, False])
def test_a_loop_over_blocks_equals_the_blocks(name, read_early):
    """The same operations in the same order, in a loop's body."""
    config = DEEP[name]
    variables, arrays = random_variables(config), inputs(config)
    looped = CLIP(config, read_early=read_early, scan=True)
    features, grads = features_and_gradients(looped, stack_layers(variables), *arrays)
    plain = features_and_gradients(unrolled(looped), variables, *arrays)
    assert_trees_close((features, unstack_layers(grads)), plain)
