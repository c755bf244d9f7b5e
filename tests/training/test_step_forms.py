"""Ways to take a step: micro-batches, a frozen tower, moving averages."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import B, make_all, make_batch, one_device_mesh, run
from tiny import CONVNET
from tiny import SHALLOW as VIT

from clip_jax.parallel.mesh import BATCH_AXES, make_mesh, place_batch
from clip_jax.training.checkpoint import Checkpoints
from clip_jax.training.step import make_cached_gradient, make_whole_gradient


def meshes():
    return {"one": one_device_mesh(), "2x2x2": make_mesh(data=2, fsdp=2, tensor=2)}


@pytest.mark.parametrize(
    ("where", "loss"),
    [("2x2x2", "softmax"), pytest.param("one", "sigmoid", marks=pytest.mark.slow)],
)
def test_micro_batches_give_the_whole_batchs_losses(where, loss):
    """With the same colors, boxes, patches and paths in both of a micro-batch's visits."""
    mesh = meshes()[where]
    options = {"loss": loss, "jitter": True, "patch_dropout": 0.5}
    options |= {"drop_path": 0.5, "erasing": 0.5}
    _, _, want = run(VIT, mesh, **options)
    _, _, got = run(VIT, mesh, microbatch_size=4, **options)
    # The same sums in another order: float32 rounding, which six steps of Adam pass on.
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_negatives_are_the_same_on_any_mesh_and_in_micro_batches(loss):
    batch = make_batch(VIT)
    rng = np.random.default_rng(3)
    batch["negative"] = rng.permutation(batch["text"])
    batch["negative_id"] = np.arange(B, dtype=np.uint32) + 10**6
    batch["negative_valid"] = rng.random(B) > 0.3
    losses = {}
    for name, mesh, options in (
        ("plain", one_device_mesh(), {}),
        ("mesh", make_mesh(data=2, fsdp=2, tensor=2), {"microbatch_size": 4}),
    ):
        state, step = make_all(VIT, mesh, loss=loss, drop_path=0.5, **options)
        losses[name] = []
        for _ in range(3):
            state, metrics = step(state, place_batch(batch, mesh))
            losses[name].append(float(metrics["loss"]))
    np.testing.assert_allclose(losses["mesh"], losses["plain"], rtol=1e-5)
    state, step = make_all(VIT, one_device_mesh(), loss=loss, drop_path=0.5)
    _, metrics = step(state, place_batch(make_batch(VIT), one_device_mesh()))
    assert float(metrics["loss"]) < losses["plain"][0]


def linear_features(params, batch_stats, rows):
    """Run towers of one matrix each, with a statistic that counts the rows it saw."""

    def unit(x):
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)

    z_image, z_text = unit(rows["x"] @ params["a"]), unit(rows["y"] @ params["b"])
    return z_image, z_text, batch_stats + rows["valid"].size


@pytest.mark.parametrize("microbatch_size", [4, 16])
def test_the_gradient_is_the_whole_batchs_to_rounding(microbatch_size):
    """Every leaf, temperature and frozen parts included, rows that are not valid among them."""
    from clip_jax.losses import make_loss

    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    rng = np.random.default_rng(0)
    a, b, x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(8, 4)] * 2 + [(B, 8)] * 2)
    trained, frozen = {"a": a, "logit_scale": jnp.float32(2.0)}, {"b": b}
    rows = {
        "x": x,
        "y": y,
        "valid": jnp.arange(B) != 3,
        "caption_id": jnp.arange(B, dtype=jnp.uint32),
    }
    loss_fn = make_loss(
        "softmax",
        mesh=mesh,
        batch_axes=BATCH_AXES,
        platform="cpu",
        tile_size=8,
        mask_equal_captions=False,
    )
    places = jax.tree.map(lambda x: jax.NamedSharding(mesh, jax.P()), trained)
    whole = make_whole_gradient(linear_features, loss_fn)
    cached = make_cached_gradient(
        linear_features, loss_fn, places, mesh=mesh, microbatch_size=microbatch_size
    )
    start = jnp.zeros(())
    want, got = (jax.jit(g)(trained, frozen, start, rows) for g in (whole, cached))
    assert float(want[1]) == float(got[1]) == B
    # Sums of 16 rows of order one, in another order.
    chex.assert_trees_all_close(got, want, rtol=2e-6, atol=1e-7)


@pytest.mark.slow
def test_micro_batches_hold_fewer_activations():
    mesh = one_device_mesh()
    batch = jax.eval_shape(lambda: place_batch(make_batch(VIT), mesh))
    memory = []
    for microbatch_size in (0, 2):
        state, step = make_all(VIT, mesh, microbatch_size=microbatch_size)
        program = step.lower(jax.eval_shape(lambda s=state: s), batch).compile()
        gradients = sum(x.nbytes for x in jax.tree.leaves(state.params))
        memory.append(program.memory_analysis().temp_size_in_bytes - gradients)
    assert memory[1] < 0.5 * memory[0]


def test_micro_batches_with_batch_norms_take_their_own_statistics():
    """Equal to the plain step where a batch is one micro-batch over and over."""
    mesh = one_device_mesh()
    batch = make_batch(CONVNET)
    part = {k: np.concatenate([v[:4]] * 4) for k, v in batch.items()}
    results = []
    for microbatch_size in (0, 4):
        state, step = make_all(CONVNET, mesh, microbatch_size=microbatch_size)
        state, metrics = step(state, place_batch(part, mesh))
        results.append((state, float(metrics["loss"]), float(metrics["grad_norm"])))
    # Float32 sums over 16 rows or four times 4.
    np.testing.assert_allclose(results[0][1:], results[1][1:], rtol=1e-5)


@pytest.mark.parametrize(("freeze", "microbatch_size"), [("image", 4), ("text", 0)])
def test_a_frozen_tower_stays_bit_for_bit_and_the_other_learns(freeze, microbatch_size):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state, step = make_all(CONVNET, mesh, freeze=freeze, microbatch_size=microbatch_size)
    before = jax.device_get(state)
    for _ in range(3):
        state, metrics = step(state, place_batch(make_batch(CONVNET), mesh))
    after = jax.device_get(state)
    frozen, other = ("visual", "text") if freeze == "image" else ("text", "visual")
    chex.assert_trees_all_equal(before.params[frozen], after.params[frozen])
    same = jax.tree.map(np.array_equal, before.params[other], after.params[other])
    assert not all(jax.tree.leaves(same)) and bool(metrics["finite"])
    # A locked image tower runs as in evaluation; a trained one updates its statistics.
    stats = jax.tree.leaves(jax.tree.map(np.array_equal, before.batch_stats, after.batch_stats))
    assert all(stats) if freeze == "image" else not any(stats)
    moments = [p for p, _ in jax.tree_util.tree_leaves_with_path(after.opt_state)]
    assert not any(frozen in jax.tree_util.keystr(path) for path in moments)


def test_gradients_of_a_frozen_tower_are_not_computed():
    """By the compiler's count of operations, which sees dead code go."""
    mesh = one_device_mesh()
    batch = place_batch(make_batch(VIT), mesh)
    flops = {}
    for freeze in ("", "image"):
        state, step = make_all(VIT, mesh, freeze=freeze)
        flops[freeze] = step.lower(state, batch).compile().cost_analysis()["flops"]
    # The image tower is most of this model; two thirds of it were its backward pass.
    assert flops["image"] < 0.6 * flops[""]


def test_moving_averages_follow_the_parameters():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state, step = make_all(CONVNET, mesh, ema_decay=0.75)
    want = jax.device_get(state.params)
    for _ in range(3):
        state, _ = step(state, place_batch(make_batch(CONVNET), mesh))
        new = jax.device_get(state.params)
        want = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, want, new)
    # Three roundings of a convex sum.
    chex.assert_trees_all_close(state.ema["params"], want, rtol=1e-6, atol=1e-8)
    moved = jax.tree.map(
        lambda a, b: np.array_equal(a, b), state.ema["batch_stats"], state.batch_stats
    )
    assert not any(jax.tree.leaves(moved))


def test_what_is_not_finite_does_not_reach_the_averages():
    mesh = make_mesh(data=8, fsdp=1, tensor=1)
    state, step = make_all(VIT, mesh, ema_decay=0.9)
    bad = {**state.params, "logit_scale": jnp.array(np.inf, jnp.float32)}
    state = state.replace(params=bad)
    before = jax.device_get(state.ema)
    state, metrics = step(state, place_batch(make_batch(VIT), mesh))
    assert not bool(metrics["finite"])
    chex.assert_trees_all_equal(before, jax.device_get(state.ema))


def test_averages_are_saved_and_are_what_a_run_is_loaded_as(tmp_path):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state, step = make_all(CONVNET, mesh, ema_decay=0.5)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    state, _ = step(state, place_batch(make_batch(CONVNET), mesh))
    saver = Checkpoints(tmp_path)
    saver.save(state, 1, {})
    restored, _ = saver.restore(shapes)
    chex.assert_trees_all_equal(restored, state)
    model, _ = saver.restore_model({"params": shapes.params, "batch_stats": shapes.batch_stats})
    saver.close()
    chex.assert_trees_all_equal(model, state.ema)
