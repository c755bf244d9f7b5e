"""The optimizer: AdamW by hand, what decays, the schedule, and the temperature's clip."""

import dataclasses
import math
import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from steps import make_all, make_batch, one_device_mesh, run
from tiny import TINY, VIT

from clip_jax.models.clip import CLIP, init_variables
from clip_jax.parallel.mesh import make_mesh, place_batch
from clip_jax.sections import OptimSection, TrainSection
from clip_jax.training.optimizer import (
    EXTENDABLE,
    SCALERS,
    clip_logit_scale,
    cooldown_start,
    decay_mask,
    make_optimizer,
    make_schedule,
    muon_matrix,
)
from clip_jax.training.state import state_shapes
from clip_jax.typing import leaves_by_path


def test_adamw_equals_the_formula():
    rng = np.random.default_rng(0)
    kernel, bias = rng.standard_normal((3, 4)), rng.standard_normal(4)
    params = {"layer": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}
    optimizer = make_optimizer(lambda step: 0.01, OptimSection())
    state = optimizer.init(params)
    want = {"kernel": kernel, "bias": bias}
    moments = {k: (np.zeros_like(v), np.zeros_like(v)) for k, v in want.items()}
    for t in range(1, 4):
        grads = {k: rng.standard_normal(v.shape) for k, v in want.items()}
        updates, state = optimizer.update(
            {"layer": {k: jnp.asarray(g) for k, g in grads.items()}}, state, params
        )
        params = optax.apply_updates(params, updates)
        for k, g in grads.items():
            m, v = moments[k]
            m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g
            moments[k] = m, v
            step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.98**t)) + 1e-6)
            want[k] = want[k] - 0.01 * (step + (0.2 * want[k] if k == "kernel" else 0))
    for k, v in want.items():
        # Three float32 updates of size 0.01 on values around 1: a few epsilons.
        np.testing.assert_allclose(params["layer"][k], v, atol=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_gains_biases_and_the_temperature_do_not_decay(name):
    params = jax.eval_shape(lambda: init_variables(CLIP(TINY[name]), 0))["params"]
    mask = traverse_util.flatten_dict(decay_mask(params), sep="/")
    for path in mask:
        leaf = path.split("/")[-1]
        matrix = leaf in ("kernel", "embedding", "proj", "text_projection", "positional_embedding")
        assert mask[path] == matrix, path
    assert mask["logit_scale"] is False
    assert mask["text/transformer/resblocks_0/mlp/c_fc/kernel"] is True


def test_schedule():
    schedule = make_schedule(OptimSection(learning_rate=1e-3, warmup_steps=100), 1000)
    assert [float(schedule(s)) for s in (0, 50, 100, 1000)] == pytest.approx([0, 5e-4, 1e-3, 0])
    middle = 100 + 900 // 2
    assert float(schedule(middle)) == pytest.approx(5e-4)
    # A short run warms up over a tenth of its steps.
    section = OptimSection(learning_rate=1e-3, warmup_steps=2000)
    assert float(make_schedule(section, 20)(2)) == pytest.approx(1e-3)
    assert float(make_schedule(section, 1)(0)) == pytest.approx(1e-3)


def test_schedules_beside_the_cosine():
    def rates(steps, at, **fields):
        section = OptimSection(learning_rate=1e-3, warmup_steps=100, **fields)
        return np.asarray(make_schedule(section, steps)(np.asarray(at)))

    linear = rates(1100, [0, 50, 100, 600, 1100], schedule="linear")
    np.testing.assert_allclose(linear, [0, 5e-4, 1e-3, 5e-4, 0], atol=1e-9)
    root = rates(1100, [50, 100, 400, 900], schedule="inverse_sqrt")
    np.testing.assert_allclose(root, [5e-4, 1e-3, 5e-4, 1e-3 / 3], rtol=1e-6)
    cooled = rates(1100, [100, 899, 1000, 1100], schedule="constant", cooldown_steps=200)
    np.testing.assert_allclose(cooled, [1e-3, 1e-3, 5e-4, 0], atol=1e-9)
    # Up to the cool-down the length of the run changes nothing.
    past = np.arange(901)
    for name in EXTENDABLE:
        short, long = (rates(n, past, schedule=name, cooldown_steps=200) for n in (1100, 5000))
        np.testing.assert_array_equal(short, long)
        assert cooldown_start(OptimSection(schedule=name, cooldown_steps=200), 1100) == 900
    assert cooldown_start(OptimSection(), 1100) is None


def test_the_decay_towards_the_start_pulls_back():
    start = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "logit_scale": jnp.array(4.0)}
    section = OptimSection(start_decay=0.5, weight_decay=0.0)
    made = make_optimizer(lambda s: 0.1, section)
    moved, zero = jax.tree.map(lambda x: x + 0.2, start), jax.tree.map(jnp.zeros_like, start)
    updates, _ = made.update(zero, made.init(start), moved)
    np.testing.assert_allclose(updates["a"]["kernel"], -0.1 * 0.5 * 0.2, rtol=1e-5)
    np.testing.assert_allclose(updates["a"]["bias"], -0.1 * 0.5 * 0.2, rtol=1e-5)
    assert float(updates["logit_scale"]) == 0
    plain = make_optimizer(lambda s: 0.1, OptimSection())
    assert jax.tree.structure(plain.init(start)) != jax.tree.structure(made.init(start))


@pytest.mark.parametrize("update", [10.0, 0.1, -0.1, -10.0])
def test_temperature_is_clipped_after_the_update(update):
    start = math.log(100) - 0.05
    params = {"logit_scale": jnp.array(start), "visual": {"logit": jnp.array(9.0)}}
    clip = clip_logit_scale(100.0)
    updates, _ = clip.update(
        {"logit_scale": jnp.array(update), "visual": {"logit": jnp.array(3.0)}},
        clip.init(params),
        params,
    )
    after = optax.apply_updates(params, updates)
    # One float32 rounding of a number near 4.6.
    assert float(after["logit_scale"]) == pytest.approx(
        min(start + update, math.log(100)), abs=5e-7
    )
    assert float(after["visual"]["logit"]) == 12.0


def test_gradient_clipping_scales_the_whole_gradient():
    params = {"kernel": jnp.ones((2, 2))}
    grads = {"kernel": 100 * jnp.ones((2, 2))}
    clipped = {"kernel": 0.5 * jnp.ones((2, 2))}  # of norm 1
    first = make_optimizer(lambda s: 0.1, OptimSection(clip_norm=1.0, weight_decay=0.0, eps=1.0))
    second = make_optimizer(lambda s: 0.1, OptimSection(clip_norm=0.0, weight_decay=0.0, eps=1.0))
    a, _ = first.update(grads, first.init(params), params)
    b, _ = second.update(clipped, second.init(params), params)
    np.testing.assert_allclose(a["kernel"], b["kernel"], rtol=1e-6)


OPTIMIZERS = list(SCALERS)
# One layer, and wide enough that Adafactor keeps rows and columns of most matrices.
SMALL = dataclasses.replace(
    VIT,
    vision=dataclasses.replace(VIT.vision, image_size=16, layers=1),
    text=dataclasses.replace(VIT.text, layers=1),
)


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), tree)


def updates_of(name, params, gradients, **changes):
    """Return the updates of several steps at a learning rate of 1, without decay."""
    optimizer = make_optimizer(lambda s: 1.0, OptimSection(name=name, weight_decay=0.0, **changes))

    def run(gradients):
        state, made = optimizer.init(params), []
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, params)
            made.append(updates)
        return made

    return jax.jit(run)(gradients)


def test_lion_equals_the_formula():
    params = {"kernel": jnp.zeros((5, 3))}
    gradients = [random_like(params, seed) for seed in range(3)]
    made = updates_of("lion", params, gradients)
    momentum = np.zeros((5, 3))
    for gradient, update in zip(gradients, made, strict=True):
        g = np.asarray(gradient["kernel"], np.float64)
        np.testing.assert_array_equal(update["kernel"], -np.sign(0.9 * momentum + 0.1 * g))
        momentum = 0.98 * momentum + 0.02 * g


def test_adafactor_equals_the_formula():
    """Rows and columns of a matrix; a vector, and a matrix that is too small, as it is."""
    params = {"kernel": jnp.zeros((40, 64)), "bias": jnp.zeros(40), "small": jnp.zeros((31, 64))}
    gradients = [random_like(params, seed) for seed in range(4)]
    made = updates_of("adafactor", params, gradients, beta2=0.6)
    row, column = np.zeros(40), np.zeros(64)
    whole = {"bias": np.zeros(40), "small": np.zeros((31, 64))}
    momentum = {k: np.zeros(v.shape) for k, v in params.items()}
    for step, (gradient, update) in enumerate(zip(gradients, made, strict=True)):
        decay = min(0.6, 1 - (step + 1) ** -0.8)
        g = {k: np.asarray(v, np.float64) for k, v in gradient.items()}
        row = decay * row + (1 - decay) * (g["kernel"] ** 2).mean(1)
        column = decay * column + (1 - decay) * (g["kernel"] ** 2).mean(0)
        scaled = {"kernel": g["kernel"] / np.sqrt(np.outer(row, column) / row.mean())}
        for k in whole:
            whole[k] = decay * whole[k] + (1 - decay) * g[k] ** 2
            scaled[k] = g[k] / np.sqrt(whole[k])
        for k in params:
            momentum[k] = 0.9 * momentum[k] + 0.1 * scaled[k]
            # Momentum is kept in bfloat16: half a unit of 8 bits, of numbers up to 1, each step.
            np.testing.assert_allclose(update[k], -momentum[k], atol=2**-8)


def test_adafactors_state_is_small():
    params = {"kernel": jnp.zeros((512, 256))}
    adam = make_optimizer(lambda s: 1.0, OptimSection()).init(params)
    adafactor = make_optimizer(lambda s: 1.0, OptimSection(name="adafactor")).init(params)
    size = 512 * 256
    assert sum(x.nbytes for x in jax.tree.leaves(adam)) >= 8 * size
    # Momentum of two bytes, one row and one column.
    assert sum(x.nbytes for x in jax.tree.leaves(adafactor)) < 2 * size + 4 * (512 + 256) + 100


def newton_schulz(g_IO):
    """Compute five steps of Jordan's quintic iteration, in float64."""
    x = g_IO / np.linalg.norm(g_IO)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


@pytest.mark.parametrize(
    ("path", "shape", "matrix"),
    [
        ("text/transformer/resblocks_0/attn/q_proj/kernel", (12, 2, 5), (12, 10)),
        ("text/transformer/resblocks_0/attn/out_proj/kernel", (2, 5, 12), (10, 12)),
        ("visual/transformer/resblocks_0/mlp/c_fc/kernel", (6, 24), (6, 24)),
        ("visual/layer1_0/conv2/kernel", (3, 3, 4, 5), (36, 5)),
        ("visual/attnpool/k_proj/kernel", (12, 2, 5), (12, 10)),
    ],
)
def test_muon_orthogonalises_the_matrix_a_kernel_is(path, shape, matrix):
    params = traverse_util.unflatten_dict({path: jnp.zeros(shape)}, sep="/")
    gradient = random_like(params, 1)
    (update,) = updates_of("muon", params, [gradient])
    g_IO = np.asarray(leaves_by_path(gradient)[path], np.float64).reshape(matrix)
    want = -0.2 * np.sqrt(max(matrix)) * newton_schulz(g_IO).reshape(shape)
    # Twenty float32 products of numbers up to 1.
    np.testing.assert_allclose(leaves_by_path(update)[path], want, atol=2e-5)
    # So large is an update of Adam: singular values come out between 0.7 and 1.2.
    assert 0.1 < np.sqrt(np.mean(want**2)) < 0.25


@pytest.mark.parametrize("name", TINY)
def test_muon_leaves_embeddings_heads_and_vectors_to_adam(name):
    params = jax.eval_shape(lambda: init_variables(CLIP(TINY[name]), 0))["params"]
    hidden = {path for path in leaves_by_path(params) if muon_matrix(path) is not None}
    inputs = {"visual/conv1/kernel"}
    heads = {"visual/attnpool/c_proj/kernel"}
    assert hidden == {p for p in leaves_by_path(params) if p.endswith("/kernel")} - inputs - heads
    state = make_optimizer(lambda s: 1.0, OptimSection(name="muon"))
    adam = leaves_by_path(jax.eval_shape(state.init, params)[1].inner_states["adam"].inner_state.nu)
    assert set(adam) == set(leaves_by_path(params)) - hidden


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stacked_layers_are_updated_as_single_ones(optimizer):
    """A tower whose layers lie in one array each, as a scan has them: the same numbers."""
    # To Adafactor a stack of so many vectors would pass for a matrix.
    layers = 33 if optimizer == "adafactor" else 3
    shapes = {
        "attn": {"q_proj": {"kernel": (34, 2, 17), "bias": (2, 17)}},
        "mlp": {"c_fc": {"kernel": (34, 40), "bias": (40,)}},
        "ln_1": {"scale": (34,)},
    }
    zeros = partial(np.zeros, dtype=np.float32)
    one = jax.tree.map(zeros, shapes, is_leaf=lambda s: isinstance(s, tuple))
    single = {"transformer": {f"resblocks_{i}": one for i in range(layers)}}

    def stacked(tree):
        blocks = [tree["transformer"][f"resblocks_{i}"] for i in range(layers)]
        return {"transformer": {"resblocks": jax.tree.map(lambda *x: np.stack(x), *blocks)}}

    gradients = [random_like(single, seed) for seed in range(2)]
    want = updates_of(optimizer, single, gradients)
    got = updates_of(optimizer, stacked(single), [stacked(g) for g in gradients])
    # The same products in batches: float32 rounding of numbers up to 1; bfloat16's momentum in
    # Adafactor, whose rounding a last bit may turn; and in Muon rounding that each of five steps
    # multiplies by up to 3.4445, as it does small singular values.
    atol = {"adafactor": 2**-8, "muon": 3.4445**5 * 2**-24}.get(optimizer, 2e-6)
    equal = partial(np.testing.assert_allclose, atol=atol)
    jax.tree.map(equal, got, [stacked(w) for w in want])
    # And the state: a checkpoint's layers can be stacked or taken apart.
    init = make_optimizer(lambda s: 1.0, OptimSection(name=optimizer)).init
    names = [leaves_by_path(jax.eval_shape(init, params)) for params in (stacked(single), single)]
    assert set(names[0]) == {re.sub(r"resblocks_\d+", "resblocks", name) for name in names[1]}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_a_gradient_only_the_decay_is_left(optimizer):
    params = random_like(jax.eval_shape(lambda: init_variables(CLIP(SMALL), 0))["params"], 0)
    made = make_optimizer(lambda s: 0.1, OptimSection(name=optimizer, weight_decay=0.5))
    zero = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(lambda: made.update(zero, made.init(params), params))()
    mask = leaves_by_path(decay_mask(params))
    for path, update in leaves_by_path(updates).items():
        want = -0.1 * 0.5 * leaves_by_path(params)[path] if mask[path] else np.zeros(update.shape)
        np.testing.assert_allclose(update, want, rtol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_holds_the_temperature(optimizer):
    params = {"logit_scale": jnp.array(4.5), "visual": {"proj": jnp.ones((4, 4))}}
    made = make_optimizer(lambda s: 0.3, OptimSection(name=optimizer))
    state, update = made.init(params), jax.jit(made.update)
    for _ in range(5):
        gradient = {"logit_scale": jnp.array(-1.0), "visual": {"proj": jnp.ones((4, 4))}}
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    # One float32 rounding of a number near 4.6.
    assert float(params["logit_scale"]) == pytest.approx(math.log(100), abs=5e-7)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns_alike_on_any_mesh(optimizer):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state, metrics, losses = run(SMALL, mesh, steps=24, optimizer=optimizer)
    _, _, want = run(SMALL, one_device_mesh(), steps=4, optimizer=optimizer)
    # Float32 sums in another order.
    np.testing.assert_allclose(losses[:4], want, rtol=1e-5)
    assert losses[-1] < 0.6 * losses[0] and bool(metrics["finite"])
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizers_state_is_split_as_the_parameters_are(optimizer):
    made = make_optimizer(lambda s: 1.0, OptimSection(name=optimizer))
    state = state_shapes(CLIP(VIT), made, make_mesh(data=2, fsdp=2, tensor=2), TrainSection())
    params = leaves_by_path(state.params)
    as_large = 0
    for name, leaf in leaves_by_path(state.opt_state).items():
        param = next((params[p] for p in params if name.endswith("/" + p)), None)
        if param is not None and leaf.shape == param.shape:
            assert leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim), name
            as_large += 1
        else:
            # Counters, and Adafactor's rows and columns.
            assert leaf.ndim <= 1 or "v_row" in name or "v_col" in name, name
    assert as_large >= len(params)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "adamw"])
def test_a_frozen_tower_stays_as_it_is(optimizer):
    mesh = make_mesh(data=8, fsdp=1, tensor=1)
    state, step = make_all(SMALL, mesh, optimizer=optimizer, freeze="image")
    assert not any("visual" in name for name in leaves_by_path(state.opt_state))
    before = jax.device_get(state.params)
    for _ in range(2):  # the first has a learning rate of 0
        state, _ = step(state, place_batch(make_batch(SMALL), mesh))
    chex.assert_trees_all_equal(before["visual"], state.params["visual"])
    changed = state.params["text"]["text_projection"] != before["text"]["text_projection"]
    assert bool(changed.any())
