"""Rows and blocks of every family's towers: shapes, and what is refused; values in test_api."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from test_formed_block import FORMS, config_of
from tiny import TEXT, TINY, VIT

from clip_jax.errors import UserError
from clip_jax.models.clip import CLIP, CLIPConfig, variable_shapes
from clip_jax.models.convnext import ConvNeXtConfig
from clip_jax.models.fastvit import FastViTConfig
from clip_jax.models.states import make_states
from clip_jax.models.text import EncoderForm
from clip_jax.models.vit import ViTConfig

ROBERTA = EncoderForm(norms="after", positions=40, pool="mean", projection="mlp")
MORE = {
    "convnext": CLIPConfig(16, ConvNeXtConfig(32, (1, 1), (8, 16)), TEXT),
    "fastvit": CLIPConfig(16, FastViTConfig(64, (1, 1, 1, 1), (8, 16, 16, 32)), TEXT),
    "roberta": dataclasses.replace(
        VIT, text=dataclasses.replace(TEXT, causal=False, encoder=ROBERTA, eot_id=2)
    ),
}
FAMILIES = {**TINY, **MORE, **{name: config_of(form) for name, form in FORMS.items()}}


def shapes_of(model, tower, blocks, inputs):
    """The shapes of all rows, of the pooled row and of the blocks, and how many rows lead."""
    states, leading = make_states(model, tower, blocks), []

    def rows(variables, inputs):
        found = states(variables, inputs)
        leading.append(found.leading_rows)
        return found.rows_BLD, found.pooled_BD, found.blocks

    found = jax.eval_shape(rows, variable_shapes(model), inputs)
    return *jax.tree.map(lambda x: x.shape, found), leading[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_states_have_every_row_and_block(name):
    config = FAMILIES[name]
    model, vision, text = CLIP(config), config.vision, config.text
    tokens = jax.ShapeDtypeStruct((2, text.context_length), jnp.int32)
    rows = (2, text.context_length, text.width)
    found = shapes_of(model, "text", [0, -1], tokens)
    assert found == (rows, (2, text.width), (rows, rows), 0)
    images = jax.ShapeDtypeStruct((2, vision.image_size, vision.image_size, 3), jnp.float32)
    if not isinstance(vision, ViTConfig):
        rows, pooled, blocks, leading = shapes_of(model, "image", [0, -1], images)
        assert rows[:2] == (2, vision.grid_size**2) and len(pooled) == 2
        assert blocks[1][:2] == rows[:2] and blocks[0][1] > rows[1] and leading == 0
        return
    rows = (2, vision.length, vision.width)
    found = shapes_of(model, "image", [1], images)
    assert found == (rows, (2, vision.width), (rows,), vision.class_token)


def test_blocks_that_are_not_there_are_named():
    with pytest.raises(UserError, match="the image tower has 4 stages, and none of number 4"):
        make_states(CLIP(TINY["resnet"]), "image", [4])
    with pytest.raises(UserError, match="the text tower has 3 blocks, and none of number -4"):
        make_states(CLIP(TINY["vit"]), "text", [-4])
    config = dataclasses.replace(TINY["vit"], embed_dim=8)
    with pytest.raises(UserError, match="tower is 'both'; it must be one of image, text"):
        make_states(CLIP(config), "both", [])
