"""How a model is computed changes nothing but rounding: kernels, remat, selected patches."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import (
    DEEP,
    assert_trees_close,
    features_and_gradients,
    make_inputs,
    random_variables,
)
from tiny import SIGLIP, VIT

from clip_jax.errors import UserError
from clip_jax.models.attention import (
    Kernel,
    attend,
    attend_padded,
    choose_kernel,
)
from clip_jax.models.block_form import BlockForm
from clip_jax.models.clip import CLIP, AttentionKernels, choose_kernels
from clip_jax.models.execution import ExecConfig
from clip_jax.models.flops import image_flops
from clip_jax.models.stack import stack_layers, unstack_layers
from clip_jax.models.target import Target
from clip_jax.models.zoo import MODELS

AMPERE = Target("cuda", capability=(8, 0))
HOPPER = Target("cuda", capability=(9, 0))
CPU, TPU = Target(), Target("tpu", "v5e")


@pytest.mark.parametrize(
    ("target", "dtype", "head_size", "queries", "keys", "kernel"),
    [
        (AMPERE, "bfloat16", 64, 50, 50, "cudnn"),
        (AMPERE, "float16", 64, 77, 77, "cudnn (77 padded to 78)"),
        (HOPPER, "bfloat16", 72, 257, 257, "cudnn (257 padded to 258)"),
        (HOPPER, "bfloat16", 64, 2, 257, "cudnn (257 padded to 258)"),
        (HOPPER, "bfloat16", 256, 50, 50, "cudnn"),
        (AMPERE, "bfloat16", 136, 50, 50, "xla (heads of 136 features, more than 128)"),
        (HOPPER, "bfloat16", 264, 50, 50, "xla (heads of 264 features, more than 256)"),
        (HOPPER, "bfloat16", 60, 50, 50, "xla (heads of 60 features, no multiple of 8)"),
        (HOPPER, "float32", 64, 50, 50, "xla (float32 activations; it takes bfloat16)"),
        (HOPPER, "bfloat16", 64, 1, 50, "xla (one query)"),
        (
            Target("cuda", capability=(7, 5)),
            *("bfloat16", 64, 50, 50),
            "xla (a GPU of compute capability 7.5, below 8.0)",
        ),
        (Target("rocm"), "bfloat16", 64, 50, 50, "xla (no NVIDIA GPU but rocm)"),
        (TPU, "bfloat16", 64, 50, 50, "pallas"),
        (TPU, "bfloat16", 80, 257, 257, "pallas"),
        (TPU, "float32", 64, 50, 50, "xla (float32 activations; it takes bfloat16)"),
        (TPU, "bfloat16", 60, 50, 50, "xla (heads of 60 features, no multiple of 8)"),
        (
            Target("tpu", "v4"),
            *("bfloat16", 64, 577, 577),
            "xla (577 rows do not fit in the fast memory of v4)",
        ),
        (CPU, "bfloat16", 64, 50, 50, "xla (no NVIDIA GPU but cpu)"),
    ],
)
def test_the_kernel_is_a_function_of_device_type_and_sizes(
    target, dtype, head_size, queries, keys, kernel
):
    rows = {"queries": queries, "keys": keys}
    sizes = {"dtype": dtype, "heads": 12, "head_size": head_size, **rows}
    assert str(choose_kernel("auto", target, **sizes)) == kernel
    assert str(choose_kernel("xla", target, **sizes)) == "xla"
    if kernel.startswith("cudnn") or queries == 1:
        assert str(choose_kernel("cudnn", target, **sizes)) == kernel
        return
    impossible = "pallas" if kernel != "pallas" else "cudnn"
    message = rf'"{impossible}", which cannot run here: .*; choose "auto" or'
    with pytest.raises(UserError, match=message):
        choose_kernel(impossible, target, **sizes)


def test_each_tower_has_a_kernel_of_its_own():
    config = MODELS["ViT-L/14"]
    model = CLIP(config, dtype=jnp.bfloat16, target=HOPPER)
    padded = Kernel("cudnn", "77 padded to 78")
    kernels = choose_kernels(model)
    assert kernels == AttentionKernels(Kernel("cudnn", "257 padded to 258"), padded)
    assert choose_kernels(model, 128).image == Kernel("cudnn", "129 padded to 130")
    resnet = CLIP(MODELS["RN50"], dtype=jnp.bfloat16, target=HOPPER)
    kernels = choose_kernels(resnet)
    assert kernels == AttentionKernels(Kernel("xla", "one query"), padded)
    assert choose_kernels(CLIP(MODELS["ConvNet-48"])).image is None
    with pytest.raises(UserError, match="cannot run here: no NVIDIA GPU but cpu;"):
        choose_kernels(CLIP(config, attention="cudnn"))


def test_a_choice_that_does_not_exist_is_a_user_error():
    for choice in ({"attention": "flash"}, {"remat": "all"}):
        with pytest.raises(UserError, match="must be one of"):
            ExecConfig(**choice)


def random_heads(seed, batch, queries, keys, heads=2, size=8):
    """Return random queries, keys and values, large enough for logits of some tens."""
    rng = np.random.default_rng(seed)
    shapes = [(batch, rows, heads, size) for rows in (queries, keys, keys)]
    return [jnp.asarray(3 * rng.standard_normal(shape), jnp.float32) for shape in shapes]


def with_gradients(form, *arrays):
    """Return the result of a form of attention, and the gradients of a weighted sum of it."""

    def total(*arrays):
        y = form(*arrays)
        return jnp.sum(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape) * y), y

    (_, y), grads = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(*arrays)
    return y, grads


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.booleans())
def test_padding_an_odd_length_by_a_row_changes_nothing(batch, queries, keys, is_causal):
    """In values and gradients, against attention over the lengths as they are."""
    keys = queries if is_causal else keys
    arrays = random_heads(queries * 8 + keys, batch, queries, keys)

    def plain(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, implementation="xla")

    def padded(q, k, v):
        return attend_padded(q, k, v, is_causal=is_causal, implementation="xla")

    assert_trees_close(with_gradients(padded, *arrays), with_gradients(plain, *arrays))


def test_the_softmax_of_bfloat16_attention_is_in_float32():
    """On the same bfloat16 inputs only the rounding of probabilities and result is left."""
    q, k, v = (x.astype(jnp.bfloat16) for x in random_heads(0, 4, 33, 33, size=64))
    expected = attend(*(x.astype(jnp.float32) for x in (q, k, v)))
    actual = attend(q, k, v)
    assert actual.dtype == jnp.bfloat16
    # Half a unit in the last of 8 bits, 2^-9, relative: once of every probability (they sum to 1)
    # and once of the result; |v| and the result are at most max|v|.
    largest = float(jnp.abs(v).max())
    assert float(jnp.abs(actual - expected).max()) <= 2 * 2**-9 * largest
    logits = jnp.einsum("blnk,bmnk->bnlm", q, k) * jnp.bfloat16(64**-0.5)
    assert logits.dtype == jnp.bfloat16
    rough = jnp.einsum("bnlm,bmnk->blnk", jax.nn.softmax(logits, axis=-1), v)
    # Logits of some tens, rounded to 8 bits, are a tenth off: the bound can fail.
    assert float(jnp.abs(rough - expected).max()) > 4 * 2 * 2**-9 * largest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "convnet", "resnet"])
def test_recomputing_changes_nothing(name):
    """Values, gradients and batch statistics come of the same operations, done once more."""
    config = DEEP[name]
    variables, arrays = random_variables(config), make_inputs(config)

    def train(model):
        return features_and_gradients(model, variables, *arrays, True, mutable=["batch_stats"])

    expected = train(CLIP(config))
    for remat in ("dots", "blocks", "full"):
        assert_trees_close(train(CLIP(config, remat=remat)), expected)


def residual_bytes(model, variables, images, tokens):
    """Return the bytes that the forward pass saves for the backward pass, the arguments aside."""

    def total(params):
        features, _ = model.apply(
            {**variables, "params": params}, images, tokens, True, mutable=["batch_stats"]
        )
        return jnp.sum(features[0] + features[1])

    _, pullback = jax.eval_shape(lambda p: jax.vjp(total, p), variables["params"])
    params = sum(x.size for x in jax.tree.leaves(variables["params"]))
    return 4 * (sum(x.size for x in jax.tree.leaves(pullback)) - params)


@pytest.mark.parametrize("scan", [False, True])
def test_each_kind_of_remat_saves_less(scan):
    variables = random_variables(VIT)
    model = CLIP(VIT, scan=scan)
    variables = stack_layers(variables) if scan else variables
    arrays = make_inputs(VIT, batch=32)
    saved = [
        residual_bytes(model.clone(remat=remat), variables, *arrays)
        for remat in ("none", "dots", "blocks", "full")
    ]
    assert all(less < 0.6 * more for more, less in itertools.pairwise(saved)), saved


@pytest.mark.parametrize("config", [VIT, SIGLIP], ids=["vit", "siglip"])
def test_selected_patches_alone_matter(config):
    """All in another order change nothing; of a choice, the others' pixels change nothing."""
    variables, (images, _) = random_variables(config), make_inputs(config, batch=2)
    encode = jax.jit(
        lambda images, patch_ids_Bl: CLIP(config).apply(
            variables, images, True, None, patch_ids_Bl, method="encode_image"
        )
    )
    patches, grid, size = config.vision.grid_size**2, config.vision.grid_size, 8
    rng = np.random.default_rng(0)
    order_BL = np.stack([rng.permutation(patches) for _ in range(2)]).astype(np.int32)
    whole = encode(images, None)
    # Attention and pooling sum over patches in another order: some epsilons of values around 1.
    np.testing.assert_allclose(encode(images, order_BL), whole, atol=5e-6, rtol=2e-5)
    patch_ids_Bl = order_BL[:, :5]
    few = encode(images, patch_ids_Bl)
    assert float(jnp.abs(few - whole).max()) > 1e-3
    other = np.asarray(images).copy()
    for row, order in enumerate(order_BL):
        for patch in order[5:]:
            i, j = divmod(int(patch), grid)
            other[row, i * size : (i + 1) * size, j * size : (j + 1) * size] += 1
    np.testing.assert_array_equal(encode(jnp.asarray(other), patch_ids_Bl), few)


def test_flops_of_some_patches_are_those_of_a_shorter_sequence():
    config = MODELS["ViT-B/16"]
    vision = config.vision
    half = dataclasses.replace(config, vision=dataclasses.replace(vision, image_size=7 * 16))
    projection = 2 * 3 * 16**2 * vision.width
    # Of 196 patches 49 stay, as in an image of half the side; all 196 are projected.
    assert image_flops(config, 49) == image_flops(half) + (196 - 49) * projection
    assert image_flops(config, 196) == image_flops(config)


def encode_along_paths(config, params, images, scale_BK2, **form):
    """Return the sum of both features and a gradient of it, where branches have factors."""
    model = CLIP(config, **form)
    stacked = stack_layers({"params": params})["params"] if form.get("scan") else params
    weights = jnp.cos(jnp.arange(config.embed_dim))
    tokens = make_inputs(config, batch=len(images))[1]

    def total(params):
        features = sum(
            model.apply({"params": params}, images, tokens, True, None, None, scale_BK2, scale_BK2)
        )
        return jnp.sum(features @ weights), features

    grads, features = jax.jit(jax.grad(total, has_aux=True))(stacked)
    return features, unstack_layers(grads)


FORMED = dataclasses.replace(
    VIT, vision=dataclasses.replace(VIT.vision, form=BlockForm("before", "swiglu"))
)


@pytest.mark.parametrize(
    "config",
    [VIT, pytest.param(FORMED, marks=pytest.mark.slow)],
    ids=["clip", "formed"],
)
def test_a_block_whose_branches_are_dropped_is_as_if_it_were_not_there(config):
    layers = config.vision.layers
    params, (images, _) = random_variables(config)["params"], make_inputs(config, batch=2)
    scale_BK2 = jnp.ones((2, layers, 2)).at[1, 0].set(0).at[0, 0, 1].set(0)
    found, _ = encode_along_paths(config, params, images, scale_BK2)

    def without(*paths):
        """Return the features where these modules give 0."""
        zeroed = jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.where(
                any(
                    name in jax.tree_util.keystr(path, simple=True, separator="/") for name in paths
                ),
                0,
                x,
            ),
            params,
        )
        return encode_along_paths(config, zeroed, images, None)[0]

    out = "transformer/resblocks_0/"
    branches = out + "attn/out_proj", out + "mlp/c_proj"
    np.testing.assert_allclose(found[1], without(*branches)[1], atol=5e-6, rtol=2e-5)
    np.testing.assert_allclose(found[0], without(branches[1])[0], atol=5e-6, rtol=2e-5)
    assert float(jnp.abs(found - encode_along_paths(config, params, images, None)[0]).max()) > 1e-3


@pytest.mark.parametrize(
    "form",
    [
        {"remat": "minimal", "scan": True},
        pytest.param({"remat": "minimal"}, marks=pytest.mark.slow),
        pytest.param({"remat": "blocks", "scan": True}, marks=pytest.mark.slow),
        pytest.param({"remat": "full"}, marks=pytest.mark.slow),
        pytest.param({"pool_last_block": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_factors_of_branches_are_the_same_however_the_tower_is_computed(form):
    config = VIT if "pool_last_block" in form else DEEP["siglip"]
    params, (images, _) = random_variables(config)["params"], make_inputs(config, batch=3)
    rng = np.random.default_rng(1)
    shape = (3, config.vision.layers, 2)
    scale_BK2 = jnp.asarray(rng.choice([0.0, 1.0, 2.0], shape), jnp.float32)
    wanted = encode_along_paths(config, params, images, scale_BK2)
    found = encode_along_paths(config, params, images, scale_BK2, **form)
    np.testing.assert_allclose(found[0], wanted[0], atol=5e-6, rtol=2e-5)
    assert_trees_close(found[1], wanted[1], atol=2e-5)
