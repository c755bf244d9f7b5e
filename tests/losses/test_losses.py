"""Every loss, in both forms, on every mesh, against one definition in values and gradients."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clip_jax.errors import UserError
from clip_jax.losses import FORMS, LOSSES, Negatives, make_loss
from clip_jax.losses.tiled import Tiling, choose_tiling, count_tiles, make_tiled_loss
from clip_jax.parallel.mesh import BATCH_AXES

ROWS, FEATURES = 24, 16
SCALE, BIAS = 20.0, -3.0

# ((data, fsdp, tensor), tile size): 24 columns are 3 x 8 at 8, and 5 x 5 with one of padding at 5.
MESHES_AND_TILES = [
    ((1, 1, 1), 5),
    ((1, 1, 1), 1000),
    ((1, 2, 1), 8),
    ((2, 1, 2), 5),
    ((2, 2, 1), 1),
    ((4, 1, 2), 8),
    ((2, 2, 2), 5),
    ((2, 4, 1), 8),
    ((8, 1, 1), 5),
]
MASKS = ["none", "invalid rows", "equal captions", "both"]

# Both sides are float32 with sums in another order: a few units in the last place (6e-8 each) of
# numbers that partly cancel, measured against the largest entry.
FLOAT32 = 5e-6

# Compiling is nearly all these tests' time; so LLVM leaves out what only makes the code faster.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def make_mesh(shape):
    """Return a mesh of so many devices along data, fsdp and tensor."""
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def unit_rows(x):
    """Return rows scaled to unit length."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make_batch(mask, rows=ROWS, features=FEATURES, seed=0):
    """Return random unit features, valid rows and caption ids; `mask` is one of MASKS."""
    rng = np.random.default_rng(seed)
    z_image, z_text = (unit_rows(rng.normal(size=(rows, features))) for _ in range(2))
    valid, caption_id = np.ones(rows, bool), np.arange(rows, dtype=np.uint32) + 2**31
    if mask in ("invalid rows", "both"):
        valid = rng.random(rows) > 0.3
    if mask in ("equal captions", "both"):
        caption_id = caption_id[rng.integers(0, rows // 2, rows)]
    return np.float32(z_image), np.float32(z_text), valid, caption_id


def compile_with_gradients(loss_fn):
    """Return (z_image, z_text, valid, caption_id) -> (LossOutput, the four gradients)."""

    def loss(z_image, z_text, scale, bias, valid, caption_id):
        output = loss_fn(z_image, z_text, scale, bias, valid, caption_id)
        return output.loss, output

    gradients = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
    step = jax.jit(gradients, compiler_options=QUICK)

    def call(z_image, z_text, valid, caption_id, scale=SCALE, bias=BIAS):
        scale, bias = jnp.float32(scale), jnp.float32(bias)
        (_, output), gradients = step(z_image, z_text, scale, bias, valid, caption_id)
        return output, gradients

    return call


def loss_of(name, form, shape, tile_size, mask_equal_captions=True):
    return make_loss(
        name,
        mesh=make_mesh(shape),
        batch_axes=BATCH_AXES,
        platform="cpu",
        tile_size=tile_size,
        mask_equal_captions=mask_equal_captions,
        form=form,
    )


@functools.cache
def compiled(name, form, shape=(1, 1, 1), tile_size=1024, mask_equal_captions=True):
    """Return the compiled loss of this name, form and mesh, one for all tests."""
    loss_fn = loss_of(name, form, shape, tile_size, mask_equal_captions)
    return compile_with_gradients(loss_fn)


def reference(name, z_image, z_text, scale, bias, valid, caption_id):
    """Return (loss, image accuracy, text accuracy) by the definition, in float64, cell by cell."""
    logits = scale * z_image.astype(np.float64) @ z_text.astype(np.float64).T
    rows = np.flatnonzero(valid)
    negatives_of = {i: [j for j in rows if j != i and caption_id[i] != caption_id[j]] for i in rows}
    loss = image_hits = text_hits = 0.0
    for i in rows:
        along_row, along_column = logits[i, negatives_of[i]], logits[negatives_of[i], i]
        image_hits += bool(np.all(logits[i, i] > along_row))
        text_hits += bool(np.all(logits[i, i] > along_column))
        if name == "softmax":
            for negatives in (along_row, along_column):
                loss += np.logaddexp.reduce([logits[i, i], *negatives]) / 2 - logits[i, i] / 2
        else:
            loss += np.logaddexp(0, -(logits[i, i] + bias))
            loss += np.sum(np.logaddexp(0, along_row + bias))
    return np.array([loss, image_hits, text_hits]) / max(len(rows), 1)


def assert_close(actual, expected, tolerance=FLOAT32):
    """Assert that arrays are within `tolerance` of the expected array's largest entry."""
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.max(np.abs(y), initial=1e-3))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("shape", "tile_size"), MESHES_AND_TILES)
@pytest.mark.parametrize("name", LOSSES)
def test_tiled_equals_dense_in_values_and_gradients(name, shape, tile_size, mask):
    batch = make_batch(mask)
    assert_close(compiled(name, "tiled", shape, tile_size)(*batch), compiled(name, "dense")(*batch))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", LOSSES)
def test_dense_is_the_definition(name, mask):
    z_image, z_text, valid, caption_id = make_batch(mask)
    output, _ = compiled(name, "dense")(z_image, z_text, valid, caption_id)
    expected = reference(name, z_image, z_text, SCALE, BIAS, valid, caption_id)
    np.testing.assert_allclose(np.array(output), expected, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_differences(name):
    z_image, z_text, valid, caption_id = make_batch("both")
    _, gradients = compiled(name, "tiled", (2, 2, 2), 5)(z_image, z_text, valid, caption_id)
    rng = np.random.default_rng(1)
    point = [np.float64(x) for x in (z_image, z_text, SCALE, BIAS)]
    for k in range(4):
        direction = rng.normal(size=point[k].shape)

        def along(step, k=k, direction=direction):
            moved = [x + step * direction if i == k else x for i, x in enumerate(point)]
            return reference(name, *moved, valid, caption_id)[0]

        # Central differences in float64: the step's own error is about 1e-9.
        derivative = (along(1e-5) - along(-1e-5)) / 2e-5
        product = np.sum(np.float64(gradients[k]) * direction)
        np.testing.assert_allclose(product, derivative, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_equal_captions_are_negatives_unless_masked(name, form):
    z_image, z_text, valid, caption_id = make_batch("both")
    plain = compiled(name, form, (2, 2, 2), 5, mask_equal_captions=False)
    output, _ = plain(z_image, z_text, valid, caption_id)
    distinct = np.arange(ROWS, dtype=np.uint32)
    expected = reference(name, z_image, z_text, SCALE, BIAS, valid, distinct)
    np.testing.assert_allclose(np.array(output), expected, rtol=1e-6)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_permuting_the_pairs_leaves_the_loss(name, form, seed):
    batch = make_batch("both")
    order = np.random.default_rng(seed).permutation(ROWS)
    call = compiled(name, form, (2, 2, 2), 5)
    output, gradients = call(*batch)
    permuted, permuted_gradients = call(*(x[order] for x in batch))
    assert_close(permuted, output)
    assert_close(permuted_gradients[0], np.asarray(gradients[0])[order])
    assert_close(permuted_gradients[1], np.asarray(gradients[1])[order])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_what_an_invalid_row_holds_cannot_matter(name, form):
    z_image, z_text, valid, caption_id = make_batch("invalid rows")
    call = compiled(name, form, (2, 2, 2), 5)
    expected = call(z_image, z_text, valid, caption_id)
    z_image, z_text = z_image.copy(), z_text.copy()
    z_image[~valid], z_text[~valid] = np.nan, np.inf
    chex.assert_trees_all_equal(call(z_image, z_text, valid, caption_id), expected)
    _, gradients = expected
    assert not any(np.any(np.asarray(dz)[~valid]) for dz in gradients[:2])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_valid_row_that_is_not_finite_shows(name, form):
    z_image, z_text, valid, caption_id = make_batch("none")
    z_image = z_image.copy()
    z_image[3, 2] = np.nan
    output, _ = compiled(name, form, (2, 2, 2), 5)(z_image, z_text, valid, caption_id)
    assert np.isnan(output.loss)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_no_valid_row_is_no_loss(name, form):
    z_image, z_text, _, caption_id = make_batch("none")
    none = np.zeros(ROWS, bool)
    result = compiled(name, form, (2, 2, 2), 5)(z_image, z_text, none, caption_id)
    chex.assert_trees_all_equal(result, jax.tree.map(jnp.zeros_like, result))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_one_valid_row_has_no_negatives(name, form):
    z_image, z_text, _, caption_id = make_batch("none")
    valid = np.arange(ROWS) == 13
    output, _ = compiled(name, form, (2, 2, 2), 5)(z_image, z_text, valid, caption_id)
    expected = reference(name, z_image, z_text, SCALE, BIAS, valid, caption_id)
    np.testing.assert_allclose(np.array(output), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_collapsed_features_at_scale_100_do_not_overflow(form):
    z = np.zeros((ROWS, FEATURES), np.float32)
    z[:, 0] = 1  # every cosine is exactly 1: all tie, and a tie is a miss
    _, _, valid, caption_id = make_batch("none")
    output, gradients = compiled("softmax", form, (2, 2, 2), 5)(
        z, z, valid, caption_id, scale=100.0
    )
    # A logit of 100 has a unit in the last place of 8e-6.
    np.testing.assert_allclose(np.array(output), [math.log(ROWS), 0, 0], atol=1.5e-5)
    chex.assert_tree_all_finite(gradients)


@pytest.mark.parametrize("form", FORMS)
def test_a_random_start_is_at_ln_n(form):
    rows, features, scale = 256, 512, 1 / 0.07
    batch = make_batch("none", rows, features)
    output, _ = compiled("softmax", form, (8, 1, 1), 100)(*batch, scale=scale)
    # Cosines of random directions have variance 1/D, hence the mean of exp(logit) adds s^2 / 2D.
    assert abs(output.loss - (math.log(rows) + scale**2 / (2 * features))) < 0.1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_features_have_float32_sums(name, form):
    z_image, z_text, valid, caption_id = make_batch("both")
    z_image, z_text = (jnp.asarray(z, jnp.bfloat16) for z in (z_image, z_text))
    output, gradients = compiled(name, form, (2, 2, 2), 5)(z_image, z_text, valid, caption_id)
    exact = (np.asarray(z, np.float32) for z in (z_image, z_text))
    expected, expected_gradients = compiled(name, "dense")(*exact, valid, caption_id)
    assert output.loss.dtype == jnp.float32 and gradients[0].dtype == jnp.bfloat16
    assert_close(output, expected)
    assert_close(gradients[2:], expected_gradients[2:])
    # One rounding to bfloat16's 8 bits, half a unit in the last place, and the float32 sums'.
    for x, y in zip(gradients[:2], expected_gradients[:2], strict=True):
        np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("name", LOSSES)
def test_replicated_parameters_get_the_single_device_gradient(name, shape):
    """Not the device count times it: the trap of gradients taken inside shard_map."""
    z_image, z_text, valid, caption_id = make_batch("both")
    rng = np.random.default_rng(2)
    params = {
        "image": np.float32(rng.normal(size=(FEATURES, FEATURES))),
        "text": np.float32(rng.normal(size=(FEATURES, FEATURES))),
        "logit_scale": np.float32(2.0),
        "bias": np.float32(-1.0),
    }

    def gradients(loss_fn, sharding):
        @functools.partial(jax.jit, compiler_options=QUICK)
        @jax.grad
        def gradient(params, x_image, x_text, valid, caption_id):
            z_image, z_text = x_image @ params["image"], x_text @ params["text"]
            z_image, z_text = (
                z / jnp.linalg.norm(z, axis=1, keepdims=True) for z in (z_image, z_text)
            )
            scale = jnp.exp(params["logit_scale"])
            # Three times the loss: the cotangent that comes in counts too.
            return 3 * loss_fn(z_image, z_text, scale, params["bias"], valid, caption_id).loss

        batch = (z_image, z_text, valid, caption_id)
        if sharding is not None:
            batch = jax.device_put(batch, sharding)
        return gradient(params, *batch)

    mesh = make_mesh(shape)
    kwargs = {
        "mesh": mesh,
        "batch_axes": BATCH_AXES,
        "platform": "cpu",
        "mask_equal_captions": True,
    }
    tiled = make_loss(name, tile_size=5, **kwargs)
    dense = make_loss(name, tile_size=5, form="dense", **kwargs)
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    assert_close(gradients(tiled, rows), gradients(dense, None))


def compile_shapes(name, mesh, rows, features, tile_size, **jit_options):
    """Compile a loss and its gradients for so many rows, without arrays."""
    loss_fn = make_loss(
        name,
        mesh=mesh,
        batch_axes=BATCH_AXES,
        platform="cpu",
        tile_size=tile_size,
        mask_equal_captions=True,
    )
    z = jax.ShapeDtypeStruct((rows, features), jnp.float32)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    valid, caption_id = (jax.ShapeDtypeStruct((rows,), x) for x in (bool, jnp.uint32))

    def loss(*inputs):
        return loss_fn(*inputs).loss

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)), **jit_options)
    return step.lower(z, z, scalar, scalar, valid, caption_id).compile()


@pytest.mark.parametrize("name", LOSSES)
def test_one_gather_one_reduce_scatter_and_no_matrix(name):
    rows, devices, tile_size = 1024, 8, 64
    mesh = make_mesh((4, 2, 1))
    r, a = (NamedSharding(mesh, spec) for spec in (PartitionSpec(BATCH_AXES), PartitionSpec()))
    executable = compile_shapes(
        name, mesh, rows, FEATURES, tile_size, in_shardings=(r, r, a, a, r, r)
    )
    text = executable.as_text()
    results = re.findall(r"= (\S+) (all-gather|reduce-scatter)(?:-start)?\(", text)
    gathers = [shape for shape, kind in results if kind == "all-gather" and shape.startswith("f32")]
    assert [x.split("{")[0] for x in gathers] == [f"f32[{rows},{FEATURES}]"]
    assert [kind for _, kind in results].count("reduce-scatter") == 1
    share = rows // devices
    assert f"[{tile_size},{tile_size}]" in text  # the tiles are there,
    assert f"[{rows},{rows}]" not in text and f"[{share},{rows}]" not in text  # and no more
    assert executable.memory_analysis().temp_size_in_bytes < share * rows * 4


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (8, 1, 1)])
@pytest.mark.parametrize("save_cosines", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_saved_cosines_change_nothing(name, save_cosines, shape):
    # Tiles of 2 rows and columns, as the rule would choose them for a batch large enough.
    _, tile_loss = LOSSES[name]
    loss_fn = make_tiled_loss(
        tile_loss,
        mesh=make_mesh(shape),
        batch_axes=BATCH_AXES,
        platform="cpu",
        tiling_rule=lambda *_: Tiling(2, save_cosines),
    )
    batch = make_batch("both")
    assert_close(compile_with_gradients(loss_fn)(*batch), compiled(name, "dense")(*batch))


def chosen(rows: int, batch_size: int, features: int = 512, platform: str = "cpu") -> Tiling:
    """Return the tiling that the rule chooses."""
    return choose_tiling(rows, batch_size, features, platform, tile_size=0)


def test_the_rule_saves_cosines_only_while_they_are_small():
    def saves(rows: int, batch_size: int) -> bool:
        return chosen(rows, batch_size).save_cosines

    assert saves(4096, 32_768) and not saves(4097, 32_768)  # 512 MiB
    assert saves(8192, 8192) and not saves(32_768, 32_768)
    # As large as the texts and their gradient.
    assert saves(1024, 2**20) and not saves(1025, 2**20)


def test_what_is_small_is_one_tile():
    assert chosen(8192, 8192) == Tiling(8192, save_cosines=True)  # 256 MiB
    assert chosen(2048, 32_768, platform="gpu") == Tiling(32_768, save_cosines=True)


def test_tiles_are_smaller_on_a_cpu():
    sizes = {p: chosen(32_768, 32_768, 768, p).size for p in ("cpu", "gpu", "tpu")}
    assert sizes == {"cpu": 1024, "gpu": 4096, "tpu": 4096}


def test_a_batch_of_32768_on_one_device_takes_less_than_450_mb():
    mesh = make_mesh((1, 1, 1))
    executable = compile_shapes("softmax", mesh, 32_768, 512, 0, compiler_options=QUICK)
    # One float32 matrix of logits is 4.3e9.
    assert executable.memory_analysis().temp_size_in_bytes < 450e6


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 5000), tile_size=st.integers(1, 6000))
def test_tiles_hold_every_column_with_little_padding(rows, tile_size):
    tiles, columns = count_tiles(rows, tile_size)
    assert columns <= tile_size
    assert 0 <= tiles * columns - rows < tiles
    assert tiles == -(-rows // tile_size)


def test_mistakes_are_named():
    kwargs = {
        "batch_axes": BATCH_AXES,
        "platform": "cpu",
        "tile_size": 0,
        "mask_equal_captions": True,
    }
    make = functools.partial(make_loss, mesh=make_mesh((2, 2, 2)), **kwargs)
    with pytest.raises(UserError, match=r"the loss is 'hinge'; .* one of softmax, sigmoid"):
        make("hinge")
    with pytest.raises(UserError, match=r"form of the loss is 'ring'; .* one of tiled, dense"):
        make("softmax", form="ring")
    with pytest.raises(UserError, match=r"\['batch'\] are not in the mesh"):
        make("softmax", batch_axes=("batch",))
    with pytest.raises(UserError, match="tile_size is -1"):
        make("softmax", tile_size=-1)
    z_image, z_text, valid, caption_id = make_batch("none", rows=6)
    with pytest.raises(UserError, match=r"6 rows does not split over 4 devices \(data x fsdp\)"):
        make("softmax")(z_image, z_text, 1.0, 0.0, valid, caption_id)


def with_negatives(mask, seed=0):
    """Return a batch and as many texts that are negatives alone, some of them not there."""
    z_image, z_text, valid, caption_id = make_batch(mask, seed=seed)
    rng = np.random.default_rng(seed + 1)
    z_negative = np.float32(unit_rows(z_text + rng.normal(size=z_text.shape) / 4))
    # Some are what another image is called.
    ids = np.where(rng.random(ROWS) < 0.2, rng.permutation(caption_id), caption_id + 1000)
    is_there = valid & (rng.random(ROWS) > 0.2)
    return z_image, z_text, valid, caption_id, z_negative, is_there, np.uint32(ids)


@functools.cache
def compiled_with_negatives(name, form, shape=(1, 1, 1), tile_size=1024):
    """Return (batch) -> (LossOutput, the five gradients)."""
    loss_fn = loss_of(name, form, shape, tile_size)

    def loss(z_image, z_text, scale, bias, z_negative, valid, caption_id, is_there, ids):
        negatives = Negatives(z_negative, is_there, ids)
        output = loss_fn(z_image, z_text, scale, bias, valid, caption_id, negatives)
        return output.loss, output

    gradients = jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True)
    step = jax.jit(gradients, compiler_options=QUICK)

    def call(z_image, z_text, valid, caption_id, z_negative, is_there, ids):
        numbers = jnp.float32(SCALE), jnp.float32(BIAS)
        (_, output), gradients = step(
            z_image, z_text, *numbers, z_negative, valid, caption_id, is_there, ids
        )
        return output, gradients

    return call


@pytest.mark.parametrize("mask", ["none", "both"])
@pytest.mark.parametrize("name", LOSSES)
def test_negatives_are_in_the_images_part_of_the_definition(name, mask):
    batch = with_negatives(mask)
    z_image, z_text, valid, caption_id, z_negative, is_there, ids = map(np.asarray, batch)
    found = np.array(compiled_with_negatives(name, "dense")(*batch)[0])
    plain = reference(name, z_image, z_text, SCALE, BIAS, valid, caption_id)
    logits = SCALE * z_image.astype(np.float64) @ np.concatenate([z_text, z_negative]).T
    rows, more, hits = np.flatnonzero(valid), 0.0, 0
    for i in rows:
        own = [j for j in rows if j != i and caption_id[j] != caption_id[i]]
        extra = [ROWS + j for j in np.flatnonzero(is_there & (ids != caption_id[i]))]
        hits += bool(np.all(logits[i, i] > logits[i, own + extra]))
        if name == "softmax":
            before = np.logaddexp.reduce(logits[i, [i, *own]])
            more += (np.logaddexp.reduce(logits[i, [i, *own, *extra]]) - before) / 2
        else:
            more += np.sum(np.logaddexp(0, logits[i, extra] + BIAS))
    expected = plain[0] + more / len(rows), hits / len(rows), plain[2]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("mask", ["none", "both"])
@pytest.mark.parametrize(
    ("shape", "tile_size"),
    [
        ((2, 2, 2), 5),
        pytest.param((1, 1, 1), 1000, marks=pytest.mark.slow),
        pytest.param((4, 1, 2), 8, marks=pytest.mark.slow),
        pytest.param((8, 1, 1), 0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", LOSSES)
def test_tiled_with_negatives_equals_dense_on_every_mesh(name, shape, tile_size, mask):
    batch = with_negatives(mask)
    tiled = compiled_with_negatives(name, "tiled", shape, tile_size)(*batch)
    assert_close(tiled, compiled_with_negatives(name, "dense")(*batch))


@pytest.mark.parametrize("name", LOSSES)
def test_negatives_that_are_not_there_change_nothing(name):
    batch = list(with_negatives("both"))
    batch[5] = np.zeros(ROWS, bool)
    output, gradients = compiled_with_negatives(name, "tiled", (2, 2, 2), 5)(*batch)
    plain = compiled(name, "dense")(*batch[:4])
    assert_close((output, gradients[:4]), plain)
    assert not np.asarray(gradients[4]).any()
