"""Tests of the relevance map against finite differences, and in cases with a known answer."""

import dataclasses
import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_cases import encode, make_image
from embedded import write_tiny_model
from model_cases import first_variables
from pairs import write_data
from PIL import Image
from tiny import TINY, VIT

from clip_jax import api
from clip_jax.errors import UserError
from clip_jax.models.clip import CLIP, unit_length
from clip_jax.models.relevance import captured_module, make_relevance
from clip_jax.tools.relevance import map_text, overlay, relevance_map, write_png


def make_inputs(config, batch=2, seed=0):
    """Return random images and random unit features of texts."""
    rng = np.random.default_rng(seed)
    size = config.vision.image_size
    images = rng.normal(size=(batch, size, size, 3)).astype(np.float32)
    z_text = unit_length(jnp.asarray(rng.normal(size=(batch, config.embed_dim))))
    return jnp.asarray(images), z_text


def make_gated_cosine(model, variables, images, z_text):
    """Return (gate of the captured output, with an axis behind it) -> cosine of image and text."""
    path, _ = captured_module(model.config)

    @jax.jit
    def cosine(gate):
        def scale(call, args, kwargs, context):
            y = call(*args, **kwargs)
            captured = context.module.path == path and context.method_name == "__call__"
            return y * gate[..., None] if captured else y

        with nn.intercept_methods(scale):
            z = model.apply(variables, images, method="encode_image")
        return jnp.sum(unit_length(z) * z_text)

    return cosine


def gain_by_difference(cosine, shape, cell, step=0.02):
    """Return the central difference of the cosine along one cell of a gate of ones."""
    ones = jnp.ones(shape)
    more, less = (float(cosine(ones.at[cell].set(1 + s))) for s in (step, -step))
    return (more - less) / (2 * step)


@pytest.mark.parametrize("family", TINY)
def test_it_is_what_the_cosine_gains_as_a_patch_is_weighed_more(family):
    """Each head's weight on each of a few patches, made larger and smaller by hand."""
    config = TINY[family]
    model, variables = CLIP(config), first_variables(config)
    images, z_text = make_inputs(config, batch=1)
    path, leading_rows = captured_module(config)
    side = config.vision.grid_size
    relevance = np.asarray(jax.jit(make_relevance(model))(variables, images, z_text))
    assert relevance.shape == (1, side, side)
    assert relevance.dtype == np.float32 and relevance.max() > 1e-3

    places = range(0, side * side, max(1, side * side // 5))
    if path[-1] == "v_proj":
        module = functools.reduce(operator.getitem, path, variables["params"])
        heads = module["kernel"].shape[1]
        shape = (1, side * side + leading_rows, heads)
        cells = [[(0, place + leading_rows, head) for head in range(heads)] for place in places]
    else:
        shape, cells = (1, side, side), [[(0, *divmod(place, side))] for place in places]
    cosine = make_gated_cosine(model, variables, images, z_text)
    expected = [
        sum(max(gain_by_difference(cosine, shape, cell), 0) for cell in group) for group in cells
    ]
    # Two cosines of float32, right to 6e-8, over 0.04 are right to 3e-6, and up to 4 heads are
    # added; the difference's cubic term is below 2e-6 (1.2e-5 at a step of 0.05).
    actual = relevance.reshape(-1)[list(places)]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1.5e-5)


def test_a_patch_that_the_features_do_not_depend_on_has_none():
    """In one block without positions or biases a black patch is a zero vector and stays one."""
    config = dataclasses.replace(
        VIT, vision=dataclasses.replace(VIT.vision, layers=1, pre_norm=False)
    )
    variables = first_variables(config)
    visual = variables["params"]["visual"]
    visual["positional_embedding"] = jnp.zeros_like(visual["positional_embedding"])
    images, z_text = make_inputs(config)
    images = images.at[:, 8:16, 16:24].set(0)
    relevance = np.asarray(jax.jit(make_relevance(CLIP(config)))(variables, images, z_text))
    assert (relevance[:, 1, 2] == 0).all() and (relevance > 0).any(axis=(1, 2)).all()


def test_patches_that_change_places_take_their_relevance_along():
    variables = first_variables(VIT)
    visual = variables["params"]["visual"]
    visual["positional_embedding"] = jnp.zeros_like(visual["positional_embedding"])
    images, z_text = make_inputs(VIT)
    order = np.random.default_rng(3).permutation(16)

    def moved(x_BHWC):
        patches = x_BHWC.reshape(2, 4, 8, 4, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 16, -1)
        patches = patches[:, order].reshape(2, 4, 4, 8, 8, 3)
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(x_BHWC.shape)

    relevance_fn = jax.jit(make_relevance(CLIP(VIT)))
    before = np.asarray(relevance_fn(variables, images, z_text)).reshape(2, 16)
    after = np.asarray(relevance_fn(variables, moved(images), z_text)).reshape(2, 16)
    # The sums over patches run in another order: a few roundings of float32.
    np.testing.assert_allclose(after, before[:, order], rtol=1e-4, atol=1e-7)


def test_images_do_not_meet():
    variables = first_variables(VIT)
    images, z_text = make_inputs(VIT, batch=3)
    relevance_fn = jax.jit(make_relevance(CLIP(VIT)))
    together = np.asarray(relevance_fn(variables, images, z_text))
    for i in range(3):
        alone = np.asarray(relevance_fn(variables, images[i : i + 1], z_text[i : i + 1]))
        # Products of another number of rows: a few roundings of float32.
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-4, atol=1e-7)


def test_the_overlay_colors_what_counts_and_leaves_the_rest():
    pixels = np.full((64, 64, 3), 200, np.uint8)
    gain = np.zeros((4, 4), np.float32)
    assert (overlay(pixels, gain) == pixels).all()
    gain[0, 0] = 3.0
    overlaid = overlay(pixels, gain)
    assert (overlaid[32:, 32:] == pixels[32:, 32:]).all() and (overlaid[:12, :12] != 200).any()


def test_the_command_writes_a_png_and_the_api_gives_its_numbers(tmp_path):
    folder, _ = write_data(tmp_path / "data", samples=12)
    model = write_tiny_model(tmp_path / "model", folder / "t.model")
    (tmp_path / "p.png").write_bytes(encode(make_image("RGB", 50, 40), "PNG"))
    result = relevance_map(str(model), str(tmp_path / "p.png"), "red bar")
    write_png(tmp_path / "map.png", result)
    text = map_text(result, "red bar", "map.png")
    assert "cosine" in text and "of 4" in text
    with Image.open(tmp_path / "map.png") as overlaid:
        assert overlaid.size == (896, 448) and overlaid.mode == "RGB"
    clip = api.load(model)
    images = clip.preprocess([make_image("RGB", 50, 40), make_image("RGB", 40, 60, seed=2)])
    both = np.asarray(clip.relevance(images, ["red bar", "blue dot"]))
    assert both.shape == (2, 4, 4)
    one = np.asarray(clip.relevance(images[:1], "red bar"))
    np.testing.assert_allclose(one[0], both[0], rtol=1e-4, atol=1e-7)  # as images do not meet
    with pytest.raises(UserError, match="2 images and 1 captions"):
        clip.relevance(images, ["red bar"])
    with pytest.raises(UserError, match="cannot be read"):
        relevance_map(str(model), str(tmp_path / "none.png"), "a")
