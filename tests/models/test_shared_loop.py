"""A loop whose devices share its kernels is the plain blocks in values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from model_cases import assert_trees_close

from clip_jax.models.clip import CLIP, variable_shapes
from clip_jax.models.execution import ExecConfig
from clip_jax.models.layers import BlockConfig, vision_block_init
from clip_jax.models.shared_loop import shared_places, shares_kernels
from clip_jax.models.stack import STACK, stack_layers
from clip_jax.models.target import Target
from clip_jax.models.transformer import Transformer
from clip_jax.models.zoo import model_config
from clip_jax.parallel.mesh import BATCH_AXES, make_mesh
from clip_jax.parallel.sharding import partition_spec
from clip_jax.typing import leaves_by_path

B, L, D = 16, 17, 64
BLOCK = BlockConfig(
    heads=2, mlp_width=96, activation="gelu", norm_eps=1e-5, init=vision_block_init(D, 96)
)
BLOCKS = {
    "plain": BLOCK,
    "causal": dataclasses.replace(BLOCK, is_causal=True),
    "scaled": dataclasses.replace(BLOCK, layer_scale=0.1),
}


def target_of(platform="cpu", *, interpret=False, **axes):
    mesh = make_mesh(**({"data": 1, "fsdp": 1, "tensor": 1} | axes))
    return Target(platform, "v5p", mesh=mesh, batch_axes=BATCH_AXES, interpret=interpret)


def transformer(block, layers=3, **how):
    return Transformer(layers, block, ExecConfig(scan=True, **how))


def inputs_of(block):
    """Return (parameters, rows [B, L, D], the outputs' weights)."""
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.standard_normal((B, L, D)), jnp.float32) for _ in range(2))
    params = transformer(block).init(jax.random.key(0), x)["params"]
    params = jax.tree.map(
        lambda p: p + 0.1 * jnp.asarray(rng.standard_normal(p.shape), jnp.float32), params
    )
    return params, x, weights


def outputs_and_gradients(model, params, x, weights, positions_BL=None):
    """Return what a transformer gives, and the gradients of the outputs' weighted mean."""

    def total(params, x):
        y = model.apply({"params": params}, x, None, positions_BL)
        # A mean: what is left of a key's bias, whose gradient is none, is below `atol` then.
        return jnp.mean(weights * y), y

    run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (_, y), grads = run(params, x)
    return y, grads


@pytest.mark.parametrize(
    ("block", "target"),
    [
        ("causal", target_of(fsdp=8)),
        ("scaled", target_of(data=2, fsdp=4)),
        # With the TPU's kernels, interpreted.
        ("plain", target_of("tpu", data=4, fsdp=2, interpret=True)),
    ],
    ids=["causal", "scaled", "kernels"],
)
def test_blocks(block, target):
    params, x, weights = inputs_of(BLOCKS[block])
    plain = outputs_and_gradients(transformer(BLOCKS[block]), params, x, weights)
    shared = transformer(BLOCKS[block], remat="minimal", target=target)
    assert_trees_close(outputs_and_gradients(shared, params, x, weights), plain)


def test_segments_of_shorter_sequences():
    block = BLOCKS["causal"]
    params, x, weights = inputs_of(block)
    ends = np.random.default_rng(1).integers(1, L, B)
    positions_BL = jnp.asarray(
        [[i if i < end else i - end for i in range(L)] for end in ends], jnp.int32
    )
    arguments = params, x, weights, positions_BL
    plain = outputs_and_gradients(transformer(block), *arguments)
    shared = transformer(block, remat="minimal", target=target_of(data=2, fsdp=4))
    assert_trees_close(outputs_and_gradients(shared, *arguments), plain)


def test_one_block_and_its_last():
    params, x, weights = inputs_of(BLOCK)
    params = params | {STACK: jax.tree.map(lambda x: x[:1], params[STACK])}
    params = {name.replace("_2", "_1"): value for name, value in params.items()}
    plain = outputs_and_gradients(transformer(BLOCK, 2), params, x, weights)
    shared = transformer(BLOCK, 2, remat="minimal", target=target_of(data=2, fsdp=4))
    assert_trees_close(outputs_and_gradients(shared, params, x, weights), plain)


def test_each_turn_exchanges_its_neighbours_kernels():
    """One gather a pass and one sum: in the loops, and once around each."""
    params, x, weights = inputs_of(BLOCK)
    target = target_of(data=2, fsdp=4)

    def count(**how):
        model = transformer(BLOCK, remat="minimal", target=target, **how)
        run = jax.grad(lambda p: jnp.sum(weights * model.apply({"params": p}, x)))
        text = str(jax.make_jaxpr(run)(params))
        return text.count("= all_gather["), text.count("= reduce_scatter[")

    assert count() == (4, 2)
    assert count(attention="xla") == (4, 2)


@pytest.mark.parametrize(
    ("target", "batch", "width", "shared"),
    [
        (target_of(data=2, fsdp=4), 16, 64, True),
        (target_of("tpu", fsdp=8), 16, 64, True),
        (target_of("cuda", fsdp=8), 16, 64, False),
        (target_of(data=8), 16, 64, False),
        (target_of(data=2, fsdp=2, tensor=2), 16, 64, False),
        (target_of(fsdp=8), 12, 64, False),
        (target_of(fsdp=8), 16, 60, False),
        (Target(), 16, 64, False),
    ],
)
def test_where_kernels_are_shared(target, batch, width, shared):
    assert shares_kernels(target, batch, width) == shared


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14"])
def test_kernels_are_taken_where_they_lie(name):
    """Of widths that the devices divide: else they would be laid out anew in every step."""
    mesh = make_mesh(data=1, fsdp=8, tensor=1)
    for tower in ("visual", "text"):
        shapes = stack_layers(variable_shapes(CLIP(model_config(name))))
        stacked = shapes["params"][tower]["transformer"][STACK]
        places = shared_places(leaves_by_path(stacked))
        for path, x in leaves_by_path(stacked).items():
            if path.endswith("kernel"):
                lies = partition_spec(f"{tower}/transformer/{STACK}/{path}", x.shape, mesh)
                assert NamedSharding(mesh, places[path]).is_equivalent_to(
                    NamedSharding(mesh, lies), len(x.shape)
                ), path
