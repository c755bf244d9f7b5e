"""The step: the same on every mesh, nothing applied that is not finite, and it learns."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import HALF, B, make_all, make_batch, one_device_mesh, run
from tiny import CONVNET, RESNET
from tiny import SHALLOW as VIT

from clip_jax.models.clip import CLIP
from clip_jax.parallel.mesh import check_batch_size, make_mesh, place_batch
from clip_jax.training.step import make_encoders

MODELS = {"vit": VIT, "resnet": RESNET}


@pytest.fixture(
    scope="module",
    params=[
        ("vit", "softmax"),
        ("vit", "sigmoid"),
        pytest.param(("resnet", "softmax"), marks=pytest.mark.slow),
    ],
)
def single(request):
    name, loss = request.param
    config = MODELS[name]
    return config, loss, run(config, one_device_mesh(), loss=loss, jitter=True)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_every_mesh_gives_one_devices_losses(single, shape):
    config, loss, (_, _, want) = single
    data, fsdp, tensor = shape
    _, _, got = run(config, make_mesh(data=data, fsdp=fsdp, tensor=tensor), loss=loss, jitter=True)
    # Float32 sums in another order; the issue of a run's first steps, 1e-5 relative.
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_it_learns_a_batch_by_heart():
    _, metrics, losses = run(VIT, make_mesh(data=2, fsdp=2, tensor=2), steps=30)
    assert losses[-1] < 0.5 * losses[0]
    assert float(metrics["image_accuracy"]) > 0.8 and float(metrics["text_accuracy"]) > 0.8


def test_first_loss_is_the_definitions():
    """The step's loss, from the encoders' features and float64 sums over the whole matrix."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state, step = make_all(VIT, mesh)
    batch = make_batch(VIT)
    encode_image, encode_text = make_encoders(CLIP(VIT), HALF)
    variables = {"params": state.params}
    z = [encode_image(variables, batch["image"]), encode_text(variables, batch["text"])]
    z_image_BD, z_text_BD = (np.asarray(x, np.float64) for x in z)
    _, metrics = step(state, place_batch(batch, mesh))

    z_image_BD /= np.linalg.norm(z_image_BD, axis=1, keepdims=True)
    z_text_BD /= np.linalg.norm(z_text_BD, axis=1, keepdims=True)
    logits_BB = z_image_BD @ z_text_BD.T / 0.07
    ids_B, valid_B = batch["caption_id"], batch["valid"]
    own_BB = np.eye(B, dtype=bool)
    seen_BB = valid_B & valid_B[:, None] & ((ids_B != ids_B[:, None]) | own_BB)
    terms = []
    for i in np.flatnonzero(valid_B):
        for line, seen in ((logits_BB[i], seen_BB[i]), (logits_BB[:, i], seen_BB[:, i])):
            terms.append(np.log(np.exp(line[seen]).sum()) - logits_BB[i, i])
    # Cosines are float32: 1e-6 on logits of at most 14.
    assert float(metrics["loss"]) == pytest.approx(np.mean(terms), rel=1e-5)


@pytest.mark.parametrize("config", [VIT, CONVNET], ids=["vit", "convnet"])
def test_bad_rows_do_not_count(config):
    """Not in the loss, and not in the batch statistics either."""
    mesh = make_mesh(data=8, fsdp=1, tensor=1)
    batch = make_batch(config)
    other = {k: v.copy() for k, v in batch.items()}
    other["image"][5] = 255 - other["image"][5]
    other["text"][5] = other["text"][6]
    results = []
    for b in (batch, other):
        state, step = make_all(config, mesh)
        state, metrics = step(state, place_batch(b, mesh))
        results.append((jax.device_get(state), float(metrics["loss"])))
    assert results[0][1] == results[1][1]
    chex.assert_trees_all_equal(results[0][0], results[1][0])


@pytest.mark.parametrize("where", ["parameter", "moment"])
@pytest.mark.parametrize("value", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
def test_what_is_not_finite_is_not_applied(where, value):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state, step = make_all(RESNET, mesh)
    if where == "parameter":
        kernel = state.params["text"]["text_projection"]
        params = {**state.params, "text": {**state.params["text"]}}
        params["text"]["text_projection"] = kernel.at[0, 0].set(value)
        state = state.replace(params=params)
    else:
        # A loss that overflows: features are finite, their scale is not.
        scale = jax.device_put(jnp.float32(value), state.params["logit_scale"].sharding)
        state = state.replace(params={**state.params, "logit_scale": scale})
    before = jax.device_get(state)
    after, metrics = step(state, place_batch(make_batch(RESNET), mesh))
    assert not bool(metrics["finite"])
    chex.assert_trees_all_equal(jax.device_get(after), before)


def test_bfloat16_trains():
    _, metrics, losses = run(VIT, make_mesh(data=8, fsdp=1, tensor=1), steps=20, dtype=jnp.bfloat16)
    assert losses[-1] < 0.7 * losses[0] and bool(metrics["finite"])


def test_state_is_donated_and_laid_out_as_before():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state, step = make_all(VIT, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    after, _ = step(state, place_batch(make_batch(VIT), mesh))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), after, shardings)
    assert all(jax.tree.leaves(same))
    kernel = after.params["text"]["transformer"]["resblocks_0"]["mlp"]["c_fc"]["kernel"]
    assert kernel.sharding.spec == jax.P("fsdp", "tensor")


def test_mesh_mistakes_name_the_numbers():
    from clip_jax.errors import UserError

    with pytest.raises(UserError, match=r"3 x 2 x 1 .* = 6 devices and there are 8"):
        make_mesh(data=3, fsdp=2, tensor=1)
    with pytest.raises(UserError, match=r"batch_size 100 is not a multiple .* = 8 .*: 96"):
        check_batch_size("config.train.batch_size", 100, make_mesh(data=-1, fsdp=1, tensor=1).shape)


def test_a_step_is_traced_once_for_each_length_of_captions():
    mesh = one_device_mesh()
    state, step = make_all(VIT, mesh, wrap_loss=functools.partial(chex.assert_max_traces, n=1))
    batch = make_batch(VIT)
    for _ in range(3):
        state, _ = step(state, place_batch(batch, mesh))
    trimmed = place_batch(batch | {"text": batch["text"][:, :8]}, mesh)
    with pytest.raises(AssertionError, match="traced > 1 times"):
        step(state, trimmed)
