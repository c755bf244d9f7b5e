"""Blocks stacked for a loop and one by one are one model; its checkpoints go both ways."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from model_cases import (
    DEEP,
    assert_trees_close,
    features_and_gradients,
    make_inputs,
    random_variables,
)
from tiny import VIT

from clip_jax.models.clip import CLIP, unrolled, variable_shapes
from clip_jax.models.stack import stack_layers, unstack_layers
from clip_jax.parallel.mesh import make_mesh
from clip_jax.parallel.sharding import partition_spec, tree_shardings
from clip_jax.training.checkpoint import Checkpoints
from clip_jax.training.state import TrainState


@pytest.mark.parametrize("name", DEEP)
def test_a_stacked_model_has_the_stacked_parameters(name):
    config = DEEP[name]
    model = CLIP(config, scan=True)
    plain = variable_shapes(unrolled(model))
    size, length = config.vision.image_size, config.text.context_length
    arrays = jnp.zeros((1, size, size, 3)), jnp.zeros((1, length), jnp.int32)
    stacked = jax.eval_shape(model.init, jax.random.key(0), *arrays)
    assert jax.eval_shape(stack_layers, plain) == stacked
    assert jax.eval_shape(unstack_layers, stacked) == plain


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit", {"remat": "blocks"}),
        pytest.param("vit", {"pool_last_block": False}, marks=pytest.mark.slow),
        pytest.param("clipa", {"remat": "dots"}, marks=pytest.mark.slow),
        pytest.param("siglip", {"remat": "full"}, marks=pytest.mark.slow),
    ],
)
def test_a_loop_over_blocks_equals_the_blocks(name, options):
    """The loop's body has the same operations in the same order."""
    config = DEEP[name]
    variables, arrays = random_variables(config), make_inputs(config)
    looped = CLIP(config, scan=True, **options)
    features, grads = features_and_gradients(looped, stack_layers(variables), *arrays)
    plain = features_and_gradients(CLIP(config), variables, *arrays)
    assert_trees_close((features, unstack_layers(grads)), plain)


def random_state(config):
    """Return a state with every kind of container: moments, masked leaves, one-element leaves."""
    params = random_variables(config)["params"]
    optimizer = optax.chain(
        optax.scale_by_adam(),
        optax.masked(optax.trace(0.9), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
        optax.scale_by_factored_rms(min_dim_size_to_factor=16),
    )
    state = jax.tree.map(lambda x: x + 1, optimizer.init(params))
    return TrainState(jnp.int32(7), params, {}, state, {"params": params, "batch_stats": {}})


def test_stacking_goes_both_ways_through_every_container():
    state = random_state(VIT)
    stacked = jax.jit(stack_layers)(state)
    kernel = stacked.opt_state[0].mu["text"]["transformer"]["resblocks"]["mlp"]["c_fc"]["kernel"]
    assert kernel.shape == (2, 32, 128)
    chex.assert_trees_all_equal(jax.jit(unstack_layers)(stacked), state, strict=True)
    chex.assert_trees_all_equal(stack_layers(stacked), stacked, strict=True)
    chex.assert_trees_all_equal(unstack_layers(state), state, strict=True)
    shapes = jax.eval_shape(lambda: state)
    assert stack_layers(shapes) == jax.eval_shape(lambda: stacked)
    assert unstack_layers(jax.eval_shape(lambda: stacked)) == shapes


def test_one_block_is_never_stacked():
    block = {"transformer": {"resblocks_0": {"kernel": jnp.ones((2, 3))}}}
    assert stack_layers(block) is not None
    chex.assert_trees_all_equal(stack_layers(block), block, strict=True)


def test_a_stack_is_sharded_as_its_blocks_are():
    """Over both axes; the axis of layers is whole, though two devices would divide it."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    tree = jax.eval_shape(lambda: random_state(VIT))

    def with_shardings(tree):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree,
            tree_shardings(tree, mesh),
        )

    name = "visual/transformer/resblocks/attn/q_proj/kernel"
    assert partition_spec(name, (2, 48, 4, 12), mesh) == jax.P(None, "fsdp", "tensor", None)
    moved, ruled = stack_layers(with_shardings(tree)), with_shardings(stack_layers(tree))
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(ruled), strict=True):
        assert a.shape == b.shape and a.sharding.is_equivalent_to(b.sharding, len(a.shape))


@pytest.mark.parametrize("saved_stacked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_checkpoint_restores_in_the_other_layout(tmp_path, saved_stacked, capsys):
    plain = random_state(VIT)
    state, other = plain, stack_layers(plain)
    if saved_stacked:
        state, other = other, state
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        other,
        tree_shardings(other, mesh),
    )
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(state.replace(step=jnp.int32(step)), step, {})
    checkpoints.close()
    # Damage is still found, and set aside, by the digests of what was saved.
    for path in (tmp_path / "checkpoints" / "2" / "model").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    checkpoints = Checkpoints(tmp_path, keep=2)
    restored, meta = checkpoints.restore(shapes)
    assert meta["step"] == 1 and (tmp_path / "quarantine" / "2").is_dir()
    chex.assert_trees_all_equal(restored, other.replace(step=jnp.int32(1)), strict=True)
    for x, shape in zip(jax.tree.leaves(restored), jax.tree.leaves(shapes), strict=True):
        assert x.sharding.is_equivalent_to(shape.sharding, x.ndim)
    model, _ = checkpoints.restore_model({"params": shapes.params, "batch_stats": {}})
    chex.assert_trees_all_equal(model["params"], other.params, strict=True)
    checkpoints.close()
    assert "checkpoint 2 is damaged and moved" in capsys.readouterr().out
