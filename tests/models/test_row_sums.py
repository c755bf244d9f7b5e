"""Sums over rows that are taken first are the plain sums, and blocks with them the plain blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import (
    assert_trees_close,
    features_and_gradients,
    make_inputs,
    random_variables,
    weighted_sum,
)
from tiny import TINY, VIT

from clip_jax.models import execution, layer_norm, minimal_block
from clip_jax.models.block_form import BlockForm
from clip_jax.models.clip import CLIP, variable_shapes
from clip_jax.models.row_sums import puts_sums_off, sum_rows_first
from clip_jax.models.stack import stack_layers
from clip_jax.models.target import Target
from clip_jax.parallel.mesh import BATCH_AXES, make_mesh


def gpus(**axes):
    """Return the target of several GPUs, in whose place are CPUs."""
    mesh = make_mesh(**({"data": 1, "fsdp": 1, "tensor": 1} | axes))
    return Target("cuda", "H100", (9, 0), mesh=mesh, batch_axes=BATCH_AXES)


@pytest.mark.parametrize(
    ("axes", "puts_off"),
    [({"data": 4, "fsdp": 2}, True), ({"data": 4, "tensor": 2}, False), ({"data": 8}, True)],
)
def test_which_devices_put_them_off(axes, puts_off):
    assert puts_sums_off(gpus(**axes)) == puts_off
    assert not puts_sums_off(dataclasses.replace(gpus(**axes), platform="tpu"))


@pytest.mark.parametrize("rows", [16, 12], ids=["shared", "not shared"])
def test_sums(rows):
    x, d = np.random.default_rng(0).standard_normal((2, rows, 5)).astype(np.float32)

    @jax.jit
    def both(x, d):
        return sum_rows_first(
            gpus(data=4, fsdp=2), lambda x, d: (x.T @ d, jnp.sum(d, 0)), (x, d), 2 * x
        )

    (product, total), waiting = both(x, d)
    # Float32 sums in another order.
    np.testing.assert_allclose(product, x.T @ d, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(total, d.sum(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(waiting, 2 * x)


@pytest.mark.parametrize("remat", ["minimal", "dots", "blocks", "none"])
@pytest.mark.parametrize("scan", [False, True])
def test_blocks(scan, remat):
    variables = random_variables(VIT)
    variables = stack_layers(variables) if scan else variables
    images, tokens = (np.repeat(x, 8, 0)[:8] for x in make_inputs(VIT))
    plain = features_and_gradients(CLIP(VIT, scan=scan), variables, images, tokens)
    model = CLIP(VIT, remat=remat, attention="xla", scan=scan, target=gpus(data=4, fsdp=2))
    assert_trees_close(features_and_gradients(model, variables, images, tokens), plain)


FORMED = dataclasses.replace(
    VIT, vision=dataclasses.replace(VIT.vision, form=BlockForm("before", "swiglu"))
)


@pytest.mark.parametrize("config", [FORMED, TINY["siglip"]], ids=["swiglu", "siglip"])
def test_blocks_without_a_backward_pass_of_their_own(config, monkeypatch):
    calls = []

    def count(target, *rest):
        calls.append(target)
        return sum_rows_first(target, *rest)

    monkeypatch.setattr(execution, "sum_rows_first", count)
    variables = random_variables(config)
    images, tokens = (np.repeat(x, 8, 0)[:8] for x in make_inputs(config))
    plain = features_and_gradients(CLIP(config), variables, images, tokens)
    model = CLIP(config, remat="auto", attention="xla", target=gpus(data=8))
    assert_trees_close(features_and_gradients(model, variables, images, tokens), plain)
    assert calls


def test_products_of_a_loop_take_no_sums_first(monkeypatch):
    calls = []

    def count(target, function, rows, waiting):
        calls.append(rows)
        return sum_rows_first(target, function, rows, waiting)

    monkeypatch.setattr(execution, "sum_rows_first", count)
    numbers = {}
    for scan in (True, False):
        model = CLIP(VIT, remat="blocks", attention="xla", scan=scan, target=gpus(data=8))
        inputs = (np.repeat(x, 8, 0)[:8] for x in make_inputs(VIT))

        def loss(variables, images, tokens, model=model):
            return weighted_sum(model.apply(variables, images, tokens))

        calls.clear()
        jax.eval_shape(jax.grad(loss), variable_shapes(model), *inputs)
        numbers[scan] = len(calls)
    # Six products a block: in a loop those of both towers' last blocks, one by one of all three.
    assert numbers == {True: 2 * 6, False: 2 * 3 * 6}


def test_a_turn_of_a_loop_ends_with_its_sums(monkeypatch):
    calls = []

    def count(target, function, rows, waiting):
        calls.append(target.batch_shards)
        return sum_rows_first(target, function, rows, waiting)

    for module in (minimal_block, layer_norm):
        monkeypatch.setattr(module, "sum_rows_first", count)
    for scan in (True, False):
        model = CLIP(VIT, remat="minimal", attention="xla", scan=scan, target=gpus(data=8))
        shapes = variable_shapes(model)
        inputs = (np.repeat(x, 8, 0)[:8] for x in make_inputs(VIT))

        def loss(variables, images, tokens, model=model):
            return weighted_sum(model.apply(variables, images, tokens))

        calls.clear()
        jax.eval_shape(jax.grad(loss), shapes, *inputs)
        # Outside of the loops are the last blocks, each for itself, and the towers' own norms.
        assert (1 in calls) == scan
