"""The optimiser: AdamW by hand, what decays, the schedule, and the temperature's clip."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from tiny import TINY

from clip_jax.models.clip import CLIP
from clip_jax.optim import clip_logit_scale, decay_mask, make_optimizer, make_schedule
from clip_jax.state import init_variables


def options(**changes):
    made = {
        "weight_decay": 0.2,
        "beta1": 0.9,
        "beta2": 0.98,
        "eps": 1e-6,
        "clip_norm": 0.0,
        "max_logit_scale": 100.0,
    }
    return made | changes


def test_adamw_equals_the_formula():
    rng = np.random.default_rng(0)
    kernel, bias = rng.standard_normal((3, 4)), rng.standard_normal(4)
    params = {"layer": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}
    optimizer = make_optimizer(lambda step: 0.01, **options())
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
    schedule = make_schedule(1e-3, 100, 1000)
    assert [float(schedule(s)) for s in (0, 50, 100, 1000)] == pytest.approx([0, 5e-4, 1e-3, 0])
    middle = 100 + 900 // 2
    assert float(schedule(middle)) == pytest.approx(5e-4)
    # A short run warms up over a tenth of its steps.
    assert float(make_schedule(1e-3, 2000, 20)(2)) == pytest.approx(1e-3)
    assert float(make_schedule(1e-3, 2000, 1)(0)) == pytest.approx(1e-3)


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
    first = make_optimizer(lambda s: 0.1, **options(clip_norm=1.0, weight_decay=0.0, eps=1.0))
    second = make_optimizer(lambda s: 0.1, **options(clip_norm=0.0, weight_decay=0.0, eps=1.0))
    a, _ = first.update(grads, first.init(params), params)
    b, _ = second.update(clipped, second.init(params), params)
    np.testing.assert_allclose(a["kernel"], b["kernel"], rtol=1e-6)
