"""The block that keeps the least is the plain block in values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import INTERPRETED
from model_cases import (
    assert_trees_close,
    features_and_gradients,
    make_inputs,
    random_variables,
)
from tiny import CLIPA, SIGLIP, VIT

from clip_jax.models.clip import CLIP
from clip_jax.models.execution import ExecConfig
from clip_jax.models.layers import (
    BlockConfig,
    ResidualBlock,
    block_parts,
    stream_packing,
    vision_block_init,
)
from clip_jax.models.minimal_block import residual_block
from clip_jax.models.packing import Packing, choose_packing
from clip_jax.models.stack import stack_layers
from clip_jax.models.target import Target

BLOCK = BlockConfig(
    heads=2,
    mlp_width=96,
    activation="quick_gelu",
    norm_eps=1e-5,
    init=vision_block_init(64, 96),
)
PACKING = choose_packing(3, 17, INTERPRETED)
BLOCKS = {
    "plain": BLOCK,
    "causal": dataclasses.replace(BLOCK, is_causal=True, activation="gelu"),
    "scaled": dataclasses.replace(BLOCK, layer_scale=0.1, activation="gelu_tanh"),
}


@pytest.mark.parametrize(
    ("config", "scan"),
    [
        pytest.param(VIT, False, id="vit"),
        pytest.param(VIT, True, id="vit-scan", marks=pytest.mark.slow),
        pytest.param(CLIPA, False, id="clipa", marks=pytest.mark.slow),
        pytest.param(SIGLIP, False, id="siglip"),
    ],
)
def test_models_with_minimal_blocks_are_the_plain_models(config, scan):
    variables, inputs = random_variables(config), make_inputs(config)
    variables = stack_layers(variables) if scan else variables
    plain = features_and_gradients(CLIP(config, scan=scan), variables, *inputs)
    minimal = CLIP(config, scan=scan, remat="minimal")
    assert_trees_close(features_and_gradients(minimal, variables, *inputs), plain)


def block_gradients(config, exec_config, parts, dtype, packing=PACKING):
    """Return a block's output and gradients, float32; `parts` None is the module."""
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.standard_normal((3, 17, 64)), jnp.float32) for _ in range(2))
    plain = ResidualBlock(config, ExecConfig(dtype=dtype))
    params = plain.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(
        lambda p: p + 0.1 * jnp.asarray(rng.standard_normal(p.shape), jnp.float32), params
    )

    def run(params, x):
        x = x.astype(dtype)
        if parts is not None:
            return packing.unflatten(residual_block(parts, params, packing.flatten(x)))
        block = ResidualBlock(config, exec_config)
        if not exec_config.is_minimal:
            return block.apply({"params": params}, x)
        chosen = stream_packing(config, exec_config, x.shape)
        return chosen.unflatten(block.apply({"params": params}, chosen.flatten(x), None, chosen))

    y, pull = jax.jit(lambda params, x: jax.vjp(run, params, x))(params, x)
    return jax.tree.map(lambda a: np.asarray(a, np.float32), (y, pull(weights.astype(dtype))))


def kernel_parts(config, dtype):
    """Return the parts of a TPU's block, in any dtype."""
    target = ExecConfig(dtype=jnp.bfloat16, target=INTERPRETED)
    return dataclasses.replace(block_parts(config, target, PACKING, 64), dtype=dtype)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_block_of_kernels_is_the_plain_block(name):
    config = BLOCKS[name]
    want = block_gradients(config, ExecConfig(), None, jnp.float32)
    got = block_gradients(config, None, kernel_parts(config, jnp.float32), jnp.float32)
    for gradients in (got[1][0]["attn"], want[1][0]["attn"]):
        # In exact arithmetic a key's bias has no gradient.
        noise = gradients["k_proj"].pop("bias")
        assert np.linalg.norm(noise) < 1e-5 * np.linalg.norm(gradients["q_proj"]["bias"])
    assert_trees_close(got, want, rtol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_rows_padded_to_an_even_length_change_nothing(name):
    """As they are for cuDNN, whose attention stays between the passes in one copy."""
    config, even = BLOCKS[name], Packing(3, 17, 18)
    parts = block_parts(config, ExecConfig(), even, 64)
    want = block_gradients(config, ExecConfig(), None, jnp.float32)
    got = block_gradients(config, None, parts, jnp.float32, even)
    for gradients in (got[1][0]["attn"], want[1][0]["attn"]):
        gradients["k_proj"].pop("bias")  # It has none in exact arithmetic.
    assert_trees_close(got, want, rtol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_bfloat16_is_no_farther_from_float32_than_the_plain_block(name):
    config, half = BLOCKS[name], jnp.bfloat16
    want = block_gradients(config, ExecConfig(), None, jnp.float32)
    near = block_gradients(config, ExecConfig(dtype=half), None, half)
    on_tpu = ExecConfig(dtype=half, remat="auto", target=INTERPRETED)
    got = block_gradients(config, on_tpu, None, half)
    # Of each array the norm of the error; a key's bias has no gradient in exact arithmetic.
    for a, b, c in zip(*map(jax.tree.leaves, (got, near, want)), strict=True):
        error, allowed = np.linalg.norm(a - c), np.linalg.norm(b - c)
        assert error <= 1.1 * allowed + 1e-3 * np.linalg.norm(c), a.shape


def test_what_stays_between_the_passes():
    """Ten numbers a feature in bfloat16 where the MLP is four times as wide, and parameters."""
    config = dataclasses.replace(BLOCK, mlp_width=256)
    exec_config = ExecConfig(dtype=jnp.bfloat16, remat="auto", target=INTERPRETED)
    packing = stream_packing(config, exec_config, (3, 17, 64))
    x = jax.ShapeDtypeStruct((3 * packing.stride, 64), jnp.bfloat16)
    block = ResidualBlock(config, exec_config)
    plain = jnp.zeros((3, 17, 64))
    params = jax.eval_shape(lambda: block.init(jax.random.key(0), plain))["params"]

    def apply(params, x):
        return block.apply({"params": params}, x, None, packing)

    assert packing.sequences == 1
    _, pull = jax.eval_shape(lambda params, x: jax.vjp(apply, params, x), params, x)
    of_rows = (x.shape, (3, packing.stride, 3 * 64), (x.shape[0], 256))
    rows = [a for a in jax.tree.leaves(pull) if a.shape in of_rows]
    assert all(a.dtype == jnp.bfloat16 for a in rows)
    assert sum(a.size for a in rows) == 10 * x.size


def test_auto_is_none_on_cpus_and_minimal_elsewhere():
    assert not ExecConfig(remat="auto").is_minimal
    assert ExecConfig(remat="auto", target=Target("cuda")).is_minimal
    assert ExecConfig(remat="minimal").is_minimal
    assert not ExecConfig(target=Target("tpu")).is_minimal
