"""Blocks of forms that are not CLIP's own: their fast paths against the plain ones, tiny."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TEXT

from clip_jax.models.block_form import BlockForm
from clip_jax.models.clip import CLIP, CLIPConfig, init_variables
from clip_jax.models.rotary import RotaryConfig, rotary_tables, rotate
from clip_jax.models.stack import stack_layers
from clip_jax.models.vit import ViTConfig
from clip_jax.pretrained.work_folder import model_from_json, model_to_json

FORMS = {
    "before": BlockForm(
        "before", "swiglu", True, True, False, RotaryConfig(3, 1.0, "columns first")
    ),
    "after": BlockForm("after", "geglu"),
}


def config_of(form: BlockForm) -> CLIPConfig:
    vision = ViTConfig(16, 4, 32, 2, 4, mlp_ratio=2.0, proj_bias=True, layer_scale=0.5, form=form)
    return CLIPConfig(16, vision, TEXT)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_fast_paths_are_the_plain_form(name):
    config = config_of(FORMS[name])
    model = CLIP(config)
    variables = init_variables(model, 0)
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    patch_ids = jnp.array([[3, 0, 9], [15, 2, 4]])

    def value_and_gradient(model, variables):
        def value(variables):
            z = model.apply(variables, images, False, None, patch_ids, method="encode_image")
            return jnp.sum(jnp.cos(jnp.arange(z.size)) * z.ravel())

        return jax.jit(jax.value_and_grad(value))(variables)

    expected, gradient = value_and_gradient(model.clone(pool_last_block=False), variables)
    fast = model.clone(scan=True, remat="minimal")
    actual, others = value_and_gradient(fast, stack_layers(variables))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    # Float32 sums in another order, of gradients around one.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), others, stack_layers(gradient)
    )


@pytest.mark.parametrize("name", FORMS)
def test_a_work_folder_keeps_the_form(name):
    config = config_of(FORMS[name])
    assert model_from_json(model_to_json(config)) == config
    plain = dataclasses.replace(config, vision=dataclasses.replace(config.vision, form=None))
    assert "form" not in model_to_json(plain)["vision"]


def test_cosines_of_turned_rows_depend_on_their_distance():
    tables = jnp.asarray(rotary_tables(RotaryConfig(8), 8, 16, 1))
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal(16), jnp.float32) for _ in range(2))
    turned_q, turned_k = (
        rotate(jnp.broadcast_to(x, (1, 65, 1, 16)), tables)[0, 1:, 0].reshape(8, 8, 16)
        for x in (q, k)
    )
    # Two rows down and one column right, from wherever.
    products = jnp.einsum("hwK,hwK->hw", turned_q[2:, 1:], turned_k[:-2, :-1])
    np.testing.assert_allclose(products, products[0, 0], atol=1e-5)
    # What stands before the patches does not turn.
    np.testing.assert_array_equal(rotate(jnp.ones((1, 65, 1, 16)), tables)[0, 0], 1)
