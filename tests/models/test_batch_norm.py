"""The batch norm that waits once a pass, against flax's own in values, gradients and digits."""

import dataclasses
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import RESNET

from clip_jax.models.batch_norm import valid_rows
from clip_jax.models.convolution import conv, middle_row, normalized
from clip_jax.models.execution import ExecConfig
from clip_jax.models.resnet import ModifiedResNet
from clip_jax.models.target import ONE_CPU, Target
from clip_jax.parallel.mesh import BATCH_AXES, make_mesh, mesh_target
from clip_jax.planning.counts import find_collectives
from clip_jax.planning.hlo import parse_program

B, H, W, C = 16, 6, 4, 8
ONE_TPU = Target("tpu", "v5e")


def make_inputs(mean_over_std=2.0, dtype=jnp.float32):
    """Return (features, cotangent, valid): a device of 8 has no valid image, one has one."""
    rng = np.random.default_rng(0)
    x = rng.normal(mean_over_std, 1, (B, H, W, C)) * 10.0 ** rng.integers(-2, 3, C)
    # Images differ from one another, as they do.
    x += rng.normal(0, 0.5, (B, 1, 1, C)) * np.std(x, axis=(0, 1, 2))
    valid = ~np.isin(np.arange(B), (4, 5, 9))
    return jnp.asarray(x, dtype), jnp.asarray(rng.normal(size=x.shape), dtype), valid


def run(target, x, dy, valid, *, relu, dtype=jnp.float32):
    """Return output, running statistics and gradients of one norm after one step."""
    apply = norm_function(target, relu=relu, dtype=dtype)
    if target.mesh is not None:
        rows = NamedSharding(target.mesh, P(BATCH_AXES))
        x, dy, valid = (jax.device_put(a, rows) for a in (x, dy, valid))
    return jax.jit(apply)(*params(), x, dy, valid)


def params():
    return jnp.linspace(0.5, 2, C), jnp.linspace(-1, 1, C)


class Identity(nn.Conv):
    """Stands for a convolution: the norm's input is given."""

    def __call__(self, x):
        return x


def norm_function(target, *, relu, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, valid):
            return normalized(
                Identity(C, (1, 1), (1, 1), ((0, 0), (0, 0))),
                x,
                valid_rows(valid, target),
                train=True,
                exec_config=ExecConfig(dtype=dtype, target=target),
                relu=relu,
                name="bn",
            )

    def apply(scale, bias, x, dy, valid):
        stats = {"mean": jnp.zeros(C), "var": jnp.ones(C)}

        def output(scale, bias, x):
            variables = {"params": {"bn": {"scale": scale, "bias": bias}}}
            variables["batch_stats"] = {"bn": stats}
            return Net().apply(variables, x, valid, mutable=["batch_stats"])

        y, back, new = jax.vjp(output, scale, bias, x, has_aux=True)
        return y, new, back(dy)

    return apply


TARGETS = {
    "one TPU": lambda: ONE_TPU,
    "data=8": lambda: mesh_target(make_mesh(data=8, fsdp=1, tensor=1)),
    "data=2, fsdp=2, tensor=2": lambda: mesh_target(make_mesh(data=2, fsdp=2, tensor=2)),
}


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_values_and_gradients_are_flaxs(name, relu):
    x, dy, valid = make_inputs()
    plain = run(ONE_CPU, x, dy, valid, relu=relu)
    fast = run(TARGETS[name](), x, dy, valid, relu=relu)
    for want, got in zip(jax.tree.leaves(plain), jax.tree.leaves(fast), strict=True):
        # Of a feature: they are scaled differently.
        size = np.abs(want).max(axis=tuple(range(want.ndim - 1)))
        assert np.all(np.abs(np.asarray(got) - want) <= 1e-5 * size)


@pytest.mark.parametrize("mean_over_std", [1e2, 1e4])
@pytest.mark.parametrize("name", ["one TPU", "data=8"])
def test_a_large_mean_costs_no_digits(name, mean_over_std):
    """Whatever the running mean, which is 0 at the start."""
    x, dy, valid = make_inputs(mean_over_std)
    _, new, _ = run(TARGETS[name](), x, dy, valid, relu=False)
    exact = np.asarray(x, np.float64)[valid].var(axis=(0, 1, 2))
    variance = (np.asarray(new["batch_stats"]["bn"]["var"], np.float64) - 0.9) / 0.1
    # A large mean is rounded itself, to a part of the deviation.
    np.testing.assert_allclose(variance, exact, rtol=2e-8 * mean_over_std + 1e-5, atol=1e-5)


def test_a_pass_waits_for_the_other_devices_once():
    target = TARGETS["data=8"]()
    rows = NamedSharding(target.mesh, P(BATCH_AXES))
    x, dy, valid = (jax.device_put(a, rows) for a in make_inputs())
    apply = norm_function(target, relu=True, dtype=jnp.float32)
    compiled = jax.jit(apply).lower(*params(), x, dy, valid).compile()
    found = find_collectives(parse_program(compiled.as_text()), 8)
    exchanged = [(c.kind, *(shape.dims for shape in c.instruction.shapes)) for c in found]
    # Before them, once a step: whether any row is valid, and how many are.
    assert exchanged == [
        ("all-reduce", ()),
        ("all-gather", (8,)),
        ("all-gather", (8, 2, C)),
        ("all-reduce", (2, C)),
    ]


def test_a_resnet_waits_once_a_norm_and_pass():
    """And its features and gradients are those of one device, whose norms are flax's."""
    # One stage compiles sooner than four.
    config, rng = dataclasses.replace(RESNET.vision, layers=(1, 0, 0, 0)), np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(B, 32, 32, 3)), jnp.float32)
    valid, dz = jnp.arange(B) != 5, jnp.asarray(rng.normal(size=(B, 16)), jnp.float32)
    one, several = (
        ModifiedResNet(config, 16, ExecConfig(target=target))
        for target in (ONE_CPU, TARGETS["data=8"]())
    )
    variables = one.init(jax.random.key(0), images)
    # So that every block has a gradient.
    params = jax.tree.map(lambda x: x + 0.1, variables["params"])
    rows = NamedSharding(make_mesh(data=8, fsdp=1, tensor=1), P(BATCH_AXES))

    def compile_gradients(tower, *args):
        def loss(params, stats, images, valid, dz):
            variables = {"params": params, "batch_stats": stats}
            z, new = tower.apply(variables, images, True, valid, mutable=["batch_stats"])
            return jnp.sum(jnp.where(valid[:, None], z * dz, 0)), new

        return jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*args).compile()

    args = (params, variables["batch_stats"], images, valid, dz)
    want = compile_gradients(one, *args)(*args)
    args = (*args[:2], *jax.device_put(args[2:], rows))
    args = (*jax.device_put(args[:2], NamedSharding(rows.mesh, P())), *args[2:])
    compiled = compile_gradients(several, *args)
    for a, b in zip(jax.tree.leaves(compiled(*args)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max() + 1e-4)
    kinds = Counter(c.kind for c in find_collectives(parse_program(compiled.as_text()), 8))
    norms = len(jax.tree.leaves(variables["batch_stats"])) // 2
    # Besides: how many rows are valid; whether any is, the loss, and what is left of gradients.
    assert kinds["all-gather"] == norms + 1 and kinds["all-reduce"] <= norms + 4


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("side", [1, 2, 5, 8])
def test_the_middle_row_is_the_convolutions(size, stride, side):
    layer = conv(4, size, 3, stride=stride, dtype=jnp.float32, name="conv")
    x = jax.random.normal(jax.random.key(0), (2, side, side, 3))
    variables = layer.init(jax.random.key(1), x)
    whole = layer.apply(variables, x)
    row = nn.apply(middle_row, layer)(variables, x)
    np.testing.assert_allclose(row, whole[:, whole.shape[1] // 2], rtol=1e-6)
