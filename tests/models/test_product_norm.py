"""A product with its batch norm as one, against the product and flax's norm one after the other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.models.batch_norm import valid_rows
from clip_jax.models.convolution import EPSILON, MOMENTUM, conv, normalized
from clip_jax.models.execution import ExecConfig
from clip_jax.models.product_norm import ProductBatchNorm
from clip_jax.models.resnet import average_pool
from clip_jax.models.target import ONE_CPU, Target
from clip_jax.parallel.mesh import BATCH_AXES, make_mesh, mesh_target
from clip_jax.planning.counts import find_collectives
from clip_jax.planning.hlo import parse_program

B, H, W, INPUTS, OUTPUTS = 16, 5, 4, 8, 24
TARGETS = {
    "one": lambda: ONE_CPU,
    "data=8": lambda: mesh_target(make_mesh(data=8, fsdp=1, tensor=1)),
    "data=2, fsdp=2, tensor=2": lambda: mesh_target(make_mesh(data=2, fsdp=2, tensor=2)),
}


def make_inputs(offset=1.0):
    """Return (parameters, inputs, cotangent, valid): one device of 8 has no valid image."""
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal(offset, 1, (B, H, W, INPUTS)), 0) * 10.0 ** rng.integers(
        -1, 2, INPUTS
    )
    kernel, dy = rng.normal(0, 0.3, (INPUTS, OUTPUTS)), rng.normal(size=(B, H, W, OUTPUTS))
    params = [kernel, np.linspace(0.5, 2, OUTPUTS), np.linspace(-1, 1, OUTPUTS)]
    valid = ~np.isin(np.arange(B), (4, 5, 9))
    return [jnp.asarray(a, jnp.float32) for a in (*params, x, dy)], jnp.asarray(valid)


def forms(target, dtype=jnp.float32):
    """Return the form as one and the plain form: each gives output, statistics and gradients."""

    class Fused(nn.Module):
        @nn.compact
        def __call__(self, x, kernel, valid):
            ones = nn.initializers.ones
            norm = ProductBatchNorm(MOMENTUM, EPSILON, dtype, ones, target, name="bn")
            return norm(x, kernel, valid_rows(valid, target))

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, kernel, valid):
            norm = nn.BatchNorm(
                False, momentum=MOMENTUM, epsilon=EPSILON, use_fast_variance=False, name="bn"
            )
            y = jnp.matmul(x, kernel.astype(dtype).astype(jnp.float32), precision="highest")
            return norm(y, mask=valid[:, None, None, None])

    def results(net):
        def run(kernel, scale, bias, x, dy, valid):
            stats = {"mean": jnp.zeros(OUTPUTS), "var": jnp.ones(OUTPUTS)}

            def output(kernel, scale, bias, x):
                variables = {"params": {"bn": {"scale": scale, "bias": bias}}}
                variables["batch_stats"] = {"bn": stats}
                return net.apply(variables, x, kernel, valid, mutable=["batch_stats"])

            y, back, new = jax.vjp(output, kernel, scale, bias, x, has_aux=True)
            return y, new, back(dy.astype(y.dtype))

        return run

    return results(Fused()), results(Plain())


@pytest.mark.parametrize("name", TARGETS)
def test_values_and_gradients_are_the_plain_forms(name):
    arrays, valid = make_inputs()
    target = TARGETS[name]()
    want = jax.jit(forms(ONE_CPU)[1])(*arrays, valid)
    if target.mesh is not None:
        rows = NamedSharding(target.mesh, P(BATCH_AXES))
        arrays[3:] = [jax.device_put(a, rows) for a in arrays[3:]]
        valid = jax.device_put(valid, rows)
    got = jax.jit(forms(target)[0])(*arrays, valid)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        # Of a feature: they are scaled differently. Of what is summed over rows, of all of them.
        size = np.abs(a).max(axis=tuple(range(a.ndim - 1)) if a.ndim > 1 else None)
        assert np.all(np.abs(np.asarray(b) - a) <= 2e-5 * size)


def test_bfloat16_is_as_near_as_the_plain_form():
    arrays, valid = make_inputs()
    arrays[3] = arrays[3].astype(jnp.bfloat16)
    exact = jax.jit(forms(ONE_CPU)[1])(*arrays[:3], arrays[3].astype(jnp.float32), arrays[4], valid)
    fused = jax.jit(forms(ONE_CPU, jnp.bfloat16)[0])(*arrays, valid)
    for want, got in zip(jax.tree.leaves(exact), jax.tree.leaves(fused), strict=True):
        error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
        assert error < 6e-3  # a bfloat16's rounding is 2e-3 of a number in the mean


def test_a_mean_far_from_zero_costs_few_digits():
    """Inputs are features behind a norm: their mean is a few deviations, here five."""
    arrays, valid = make_inputs(offset=5.0)
    _, new, _ = jax.jit(forms(ONE_CPU)[0])(*arrays, valid)
    y = np.asarray(arrays[3], np.float64)[np.asarray(valid)] @ np.asarray(arrays[0], np.float64)
    variance = (np.asarray(new["batch_stats"]["bn"]["var"], np.float64) - 0.9) / 0.1
    np.testing.assert_allclose(variance, y.var(axis=(0, 1, 2)), rtol=2e-4)


def test_a_pass_waits_for_the_other_devices_once():
    target = TARGETS["data=8"]()
    rows = NamedSharding(target.mesh, P(BATCH_AXES))
    arrays, valid = make_inputs()
    arrays[3:] = [jax.device_put(a, rows) for a in arrays[3:]]
    step = jax.jit(forms(target)[0]).lower(*arrays, jax.device_put(valid, rows)).compile()
    found = find_collectives(parse_program(step.as_text()), 8)
    exchanged = [(c.kind, *(shape.dims for shape in c.instruction.shapes)) for c in found]
    assert exchanged[:2] == [("all-reduce", ()), ("all-gather", (8,))]
    assert sorted(exchanged[2:]) == [
        ("all-gather", (8, 2, OUTPUTS)),
        ("all-reduce", (2, OUTPUTS)),
        ("all-reduce", (INPUTS, OUTPUTS)),
    ]


def test_wide_products_on_accelerators_are_one_with_their_norm():
    class Net(nn.Module):
        features: int
        target: Target

        @nn.compact
        def __call__(self, x, train=True):
            layer = conv(self.features, 1, INPUTS, dtype=jnp.bfloat16, name="conv")
            how = ExecConfig(dtype=jnp.bfloat16, target=self.target)
            return normalized(layer, x, None, train=train, exec_config=how, name="bn")

    x = jnp.ones((2, 3, 3, INPUTS), jnp.bfloat16)
    for features, platform, fused in (
        (OUTPUTS, "tpu", 1),
        (OUTPUTS, "cuda", 1),
        (INPUTS, "tpu", 0),
        (OUTPUTS, "cpu", 0),
    ):
        net = Net(features, Target(platform))
        variables = net.init(jax.random.key(0), x)
        assert set(variables["params"]) == {"conv", "bn"}
        traced = jax.make_jaxpr(lambda v, net=net: net.apply(v, x, mutable=["batch_stats"]))
        assert str(traced(variables)).count("_normalized_product") == fused


@pytest.mark.parametrize("size", [1, 2])
def test_pooling_by_products_is_pooling(size):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 6, 4, INPUTS)), jnp.float32)
    dy = jnp.asarray(rng.standard_normal((2, 6 // size, 4 // size, INPUTS)), jnp.float32)
    results = []
    for target in (ONE_CPU, Target("tpu", "v5e")):
        y, back = jax.vjp(lambda x, target=target: average_pool(x, size, target), x)
        results.append((y, *back(dy)))
    for want, got in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
