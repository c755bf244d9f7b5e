"""Both towers: sizes, initialization, causality, and every saving against its plain form."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import (
    assert_trees_close,
    features_and_gradients,
    first_variables,
    make_inputs,
    make_tokens,
)
from tiny import CONVNET, RESNET, SIGLIP, TEXT, TINY, VIT

from clip_jax.errors import UserError
from clip_jax.models import table
from clip_jax.models.clip import CLIP, unit_length, variable_shapes
from clip_jax.models.flops import image_flops, text_flops
from clip_jax.models.layers import LayerNorm, gelu, gelu_tanh, quick_gelu
from clip_jax.models.text import TextTransformer, end_positions
from clip_jax.models.vit import VisionTransformer, ViTConfig
from clip_jax.models.zoo import MODELS, list_models, model_config, unsupported_reason
from clip_jax.pretrained.work_folder import model_from_json, model_to_json
from clip_jax.training.state import parameter_counts

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden/open_clip_parameter_counts.json").read_text()
)
MODELS_MD = Path(__file__).parents[2] / "docs/models.md"
# One model at full depth for each kind of tower; `parameter_counts` of the table counts the others.
FULL_DEPTH = [
    "RN50",
    "RN50x64",
    "ViT-B/32",
    "ViT-S/16",
    "ConvNet-48",
    "ViT-M-16-alt",
    "ViT-L-14-CLIPA",
    "ViT-SO400M-16-SigLIP-i18n-256",
]

# Image tower + text tower of the originals (openai/CLIP `clip/model.py`), closed-form sums equal
# to open_clip's docs/model_profile.csv; `logit_scale` is one more.
PUBLISHED = {
    "RN50": (38_316_896, 63_690_240),
    "RN101": (56_259_936, 63_428_096),
    "RN50x4": (87_137_080, 91_163_520),
    "RN50x16": (167_328_912, 123_650_304),
    "RN50x64": (420_380_352, 202_877_952),
    "ViT-B/32": (87_849_216, 63_428_096),
    "ViT-B/16": (86_192_640, 63_428_096),
    "ViT-L/14": (303_966_208, 123_650_304),
    "ViT-L/14@336px": (304_293_888, 123_650_304),
}


@functools.cache
def full_size_shapes(name):
    """Return the shapes of a full-size model's variables."""
    return variable_shapes(CLIP(MODELS[name]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_originals(name):
    counts = parameter_counts(full_size_shapes(name)["params"])
    image, text = PUBLISHED[name]
    assert (counts["image"], counts["text"], counts["other"]) == (image, text, 1)


def test_vit_b32_total():
    assert parameter_counts(full_size_shapes("ViT-B/32")["params"])["total"] == 151_277_313


@pytest.mark.parametrize("name", FULL_DEPTH)
def test_full_size_shapes(name):
    config = MODELS[name]
    model, size = CLIP(config), config.vision.image_size
    image, text = jax.eval_shape(
        model.apply,
        full_size_shapes(name),
        jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32),
        jax.ShapeDtypeStruct((2, 16), jnp.int32),
    )
    assert image.shape == text.shape == (2, config.embed_dim)
    counts = parameter_counts(full_size_shapes(name)["params"])
    assert (counts["image"], counts["text"]) == table.parameter_counts(config)
    assert counts["other"] == 1 + (config.init_logit_bias is not None)


OPEN_CLIP_COUNTS = GOLDEN["counts"] | GOLDEN["families"]


@pytest.mark.parametrize("name", OPEN_CLIP_COUNTS)
def test_parameter_count_is_open_clips(name):
    assert list(table.parameter_counts(MODELS[name])) == OPEN_CLIP_COUNTS[name]


def test_every_model_of_open_clip_is_here_or_refused_by_name():
    assert set(OPEN_CLIP_COUNTS) < set(list_models())
    for name in GOLDEN["left_out"]:
        reason = unsupported_reason(name)
        assert reason is not None and "\n" not in reason
        with pytest.raises(UserError, match=f"^{name} is of a family that is not supported: "):
            model_config(name)
    assert not any(unsupported_reason(name) for name in [*list_models(), "ViT-X"])


def test_unknown_model_is_a_user_error_that_names_the_nearest():
    with pytest.raises(UserError, match=r"no model is called 'vit-b-32'.*nearest are ViT-B-32,"):
        model_config("vit-b-32")
    with pytest.raises(UserError, match=r"no model is called 'dog'; list_models\(\) has all"):
        model_config("dog")
    assert set(PUBLISHED) < set(list_models())


def test_the_table_of_the_documentation_is_up_to_date():
    document = MODELS_MD.read_text()
    assert table.update_table(document) == document, (
        f"run python -m clip_jax.models.table {MODELS_MD}"
    )


@pytest.mark.parametrize("config", [*TINY.values(), MODELS["ViT-SO400M-16-SigLIP-i18n-256"]])
def test_a_work_folder_keeps_every_field(config):
    assert model_from_json(json.loads(json.dumps(model_to_json(config)))) == config


def test_a_work_folder_of_one_activation_is_read():
    """Such folders were written before each tower had its own activation."""
    values = model_to_json(MODELS["ViT-B-32"])
    for tower in ("vision", "text"):
        del values[tower]["activation"]
    assert model_from_json({**values, "activation": "gelu"}) == MODELS["ViT-B-32"]
    values = model_to_json(MODELS["RN50"])
    del values["text"]["activation"]
    assert model_from_json({**values, "activation": "quick_gelu"}) == MODELS["RN50"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dataclasses.replace(TEXT, activation="tanh"), "text.activation is 'tanh'"),
        (lambda: dataclasses.replace(TEXT, pool="first"), "must be one of end, last"),
        (lambda: dataclasses.replace(VIT.vision, activation="tanh"), "vision.activation"),
        (lambda: dataclasses.replace(VIT.vision, pool="none"), "token, average, map"),
        (lambda: dataclasses.replace(VIT.vision, class_token=False), "set class_token"),
        (lambda: dataclasses.replace(SIGLIP, embed_dim=40), "must equal embed_dim, 40"),
    ],
)
def test_a_config_that_does_not_fit_is_a_user_error(make, message):
    with pytest.raises(UserError, match=message):
        make()


def leaf_std(params, *path):
    """Return the standard deviation of one array of a tree."""
    for name in path:
        params = params[name]
    return float(jnp.std(params))


def test_initialization_is_the_papers():
    """Standard deviations of openai/CLIP `initialize_parameters` and of PyTorch's defaults.

    The sample deviation of n values is off by about 1/sqrt(2n); the smallest array here has 5,120
    values, so 4 % is four of its standard errors.
    """
    text = dataclasses.replace(TEXT, width=128, layers=2, heads=2, vocab_size=512, eot_id=511)
    vision = dataclasses.replace(VIT.vision, width=256, layers=2, heads=4, image_size=64)
    config = dataclasses.replace(VIT, vision=vision, text=text, embed_dim=64)
    params = first_variables(config)["params"]
    uniform = 3**-0.5  # deviation of U(-1, 1)
    t, v = ("text", "transformer", "resblocks_0"), ("visual", "transformer", "resblocks_0")
    expected = {
        ("text", "token_embedding", "embedding"): 0.02,
        (*t, "attn", "q_proj", "kernel"): 128**-0.5,
        (*t, "attn", "v_proj", "kernel"): 128**-0.5,
        (*t, "attn", "out_proj", "kernel"): 128**-0.5 * 4**-0.5,
        (*t, "mlp", "c_proj", "kernel"): 128**-0.5 * 4**-0.5,
        (*t, "mlp", "c_fc", "kernel"): 256**-0.5,
        ("text", "text_projection"): 128**-0.5,
        ("visual", "positional_embedding"): 256**-0.5,
        ("visual", "proj"): 256**-0.5,
        ("visual", "conv1", "kernel"): (3 * 64) ** -0.5 * uniform,
        (*v, "attn", "k_proj", "kernel"): (6 / 1024) ** 0.5 * uniform,
        (*v, "attn", "out_proj", "kernel"): 256**-0.5 * uniform,
        (*v, "mlp", "c_fc", "kernel"): 256**-0.5 * uniform,
        (*v, "mlp", "c_proj", "kernel"): 1024**-0.5 * uniform,
    }
    for path, std in expected.items():
        assert leaf_std(params, *path) == pytest.approx(std, rel=0.04), path
    # 24 x 128 values: 5.2 % is four standard errors.
    assert leaf_std(params, "text", "positional_embedding") == pytest.approx(0.01, rel=0.052)
    assert float(params["logit_scale"]) == pytest.approx(np.log(1 / 0.07))
    block = params["visual"]["transformer"]["resblocks_0"]
    assert not block["attn"]["q_proj"]["bias"].any() and not block["attn"]["out_proj"]["bias"].any()


def test_resnet_initialization():
    params = first_variables(RESNET)["params"]["visual"]
    assert not params["layer1_0"]["bn3"]["scale"].any()
    assert (params["layer1_0"]["bn1"]["scale"] == 1).all()
    assert float(jnp.std(params["attnpool"]["q_proj"]["kernel"])) == pytest.approx(
        256**-0.5, rel=0.02
    )


def test_siglip_starts_as_timms_image_tower():
    vision = dataclasses.replace(SIGLIP.vision, width=256, layers=1)
    text = dataclasses.replace(TEXT, layers=1, proj_bias=True)
    config = dataclasses.replace(SIGLIP, vision=vision, text=text, embed_dim=256)
    params = first_variables(config)["params"]
    assert float(params["logit_bias"]) == -10
    assert not params["text"]["text_projection_bias"].any()
    visual = params["visual"]
    pool, block = visual["attn_pool"], visual["transformer"]["resblocks_0"]
    small = [
        visual["positional_embedding"],
        block["attn"]["q_proj"]["kernel"],
        block["attn"]["out_proj"]["kernel"],
        block["mlp"]["c_fc"]["kernel"],
        pool["attn"]["k_proj"]["kernel"],
        pool["mlp"]["c_proj"]["kernel"],
    ]
    for x in small:
        # 4,096 values or more: 4.5 % is four standard errors of their deviation.
        assert float(jnp.std(x)) == pytest.approx(0.02, rel=0.045)
    assert not block["mlp"]["c_fc"]["bias"].any() and not pool["mlp"]["c_proj"]["bias"].any()
    # A normal cut at two deviations has 0.88 of its deviation; 256 values, 4.4 % each error.
    assert float(jnp.std(pool["probe"])) == pytest.approx(0.88 / 16, rel=0.18)
    assert float(jnp.abs(pool["probe"]).max()) <= 2 / 16
    assert (block["ls_1"]["gamma"] == jnp.float32(0.1)).all()


def test_activations():
    x = jnp.linspace(-4, 4, 101)
    erf = np.vectorize(math.erf)
    # Rounding of one float32 expression of size 4.
    np.testing.assert_allclose(gelu(x), x * 0.5 * (1 + erf(x / 2**0.5)), atol=1e-6)
    np.testing.assert_allclose(quick_gelu(x), x / (1 + np.exp(-1.702 * x)), atol=1e-6)
    tanh = np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))
    np.testing.assert_allclose(gelu_tanh(x), 0.5 * x * (1 + tanh), atol=1e-6)


def test_layer_norm_does_not_cancel():
    """A mean of 1,000 deviations: E[x^2] - E[x]^2 would lose six of float32's seven digits."""
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32) + 1000
    exact = x.astype(np.float64) - x.astype(np.float64).mean(-1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5)
    norm, x = LayerNorm(), jnp.asarray(x)
    # The mean is right to two units in the last place of 1,000, 1.2e-4; the fast form is 0.3 off.
    np.testing.assert_allclose(norm.apply(norm.init(jax.random.key(0), x), x), exact, atol=1.3e-4)


def test_end_position_is_the_first_end_token():
    tokens = jnp.array([[5, 63, 0, 0], [1, 2, 63, 63], [63, 1, 1, 1]])
    assert end_positions(tokens, 63).tolist() == [1, 2, 0]


@pytest.fixture(scope="module", params=list(TINY))
def tiny(request):
    """Return (config, variables, images, tokens) of each family's tiny model."""
    config = TINY[request.param]
    rng = np.random.default_rng(0)
    variables = first_variables(config)
    # Zero biases and unit gains would hide an error in them; variances stay positive.
    variables = jax.tree.map(
        lambda x: x + rng.uniform(-0.1, 0.1, x.shape).astype(np.float32), variables
    )
    return config, variables, *make_inputs(config)


def test_pooling_in_the_last_block_equals_pooling_after_it(tiny):
    config, *rest = tiny
    fast = features_and_gradients(CLIP(config), *rest)
    plain = features_and_gradients(CLIP(config, pool_last_block=False), *rest)
    assert_trees_close(fast, plain)


def test_trimming_to_the_end_token_equals_the_full_length(tiny):
    config, variables, images, tokens = tiny
    tokens = tokens.at[:, 12:].set(0).at[:, 11].set(TEXT.eot_id)
    if not config.text.supports_trimming:
        encode = jax.jit(lambda tokens: CLIP(config).apply(variables, tokens, method="encode_text"))
        assert float(jnp.abs(encode(tokens[:, :12]) - encode(tokens)).max()) > 0.01
        return
    whole = features_and_gradients(CLIP(config), variables, images, tokens)
    trimmed = features_and_gradients(CLIP(config), variables, images, tokens[:, :12])
    assert_trees_close(trimmed, whole)


def test_nothing_behind_the_end_token_matters():
    """Gradients with respect to the embedded tokens prove it."""
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(make_tokens(rng, 6))
    model = TextTransformer(TEXT, 16)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    table = variables["params"]["token_embedding"]["embedding"]
    # Every position gets a row of the table for itself, so that its gradient can be told apart.
    positions = jnp.arange(tokens.size, dtype=jnp.int32).reshape(tokens.shape)
    params = {**variables["params"], "token_embedding": {"embedding": table[tokens.reshape(-1)]}}
    ends = np.asarray(end_positions(tokens, TEXT.eot_id))

    for row in range(2):
        end = int(ends[row])
        eot_id = row * tokens.shape[1] + end
        config = dataclasses.replace(TEXT, vocab_size=tokens.size, eot_id=eot_id)
        model = TextTransformer(config, 16)

        def feature(params, model=model, row=row):
            return jnp.sum(model.apply({"params": params}, positions[row : row + 1]))

        grad = jax.jit(jax.grad(feature))(params)["token_embedding"]["embedding"]
        grad_LD = grad.reshape(*tokens.shape, -1)[row]
        assert not grad_LD[end + 1 :].any()
        assert jnp.abs(grad_LD[: end + 1]).max(axis=1).min() > 0


def test_padding_behind_the_end_token_does_not_matter():
    rng = np.random.default_rng(2)
    tokens = make_tokens(rng, 4)
    model = TextTransformer(TEXT, 16)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    other = tokens.copy()
    for row in other:
        end = int(np.argmax(row == TEXT.eot_id))
        row[end + 1 :] = rng.integers(1, TEXT.eot_id, row.size - end - 1)
    apply = jax.jit(model.apply)
    np.testing.assert_array_equal(apply(variables, tokens), apply(variables, other))


def test_bfloat16_stays_near_float32():
    variables = first_variables(VIT)
    inputs = make_inputs(VIT)
    expected = jax.jit(CLIP(VIT).apply)(variables, *inputs)
    actual = jax.jit(CLIP(VIT, dtype=jnp.bfloat16).apply)(variables, *inputs)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == jnp.float32
        # bfloat16 keeps 8 bits: 2^-8 a rounding, a dozen roundings deep, on unit vectors.
        assert float(jnp.abs(a - b).max()) < 12 * 2**-8
        assert not jnp.array_equal(a, b)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=4, max_size=4))
def test_unit_length(row):
    z = unit_length(jnp.array([row, [1, 2, 3, 4.0]]))
    norm = float(np.linalg.norm(np.asarray(row, np.float64)))
    if norm > 1e-6:
        assert float(jnp.linalg.norm(z[0])) == pytest.approx(1, abs=1e-6)
    grad = jax.grad(lambda x: unit_length(x).sum())(jnp.zeros((2, 4)))
    assert jnp.isfinite(grad).all()


def test_batch_statistics_change_in_training_alone(tiny):
    config, variables, images, _ = tiny
    model = CLIP(config)
    apply = jax.jit(
        lambda train: model.apply(
            variables, images, train, method="encode_image", mutable=["batch_stats"]
        ),
        static_argnums=0,
    )
    _, still = apply(False)
    _, moved = apply(True)
    if not variables.get("batch_stats"):
        assert not jax.tree.leaves(still) and not jax.tree.leaves(moved)
        return
    before = variables["batch_stats"]["visual"]["bn1"]["mean"]
    after = moved["batch_stats"]["visual"]["bn1"]["mean"]
    np.testing.assert_array_equal(still["batch_stats"]["visual"]["bn1"]["mean"], before)
    kernel = variables["params"]["visual"]["conv1"]["kernel"]
    stride, pad = (4, 0) if config is CONVNET else (2, 1)
    x = jax.lax.conv_general_dilated(
        images, kernel, (stride,) * 2, [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    # PyTorch's momentum 0.1; one float32 mean over at most 4,096 values in another order.
    np.testing.assert_allclose(after, 0.9 * before + 0.1 * x.mean((0, 1, 2)), atol=1e-6)


@pytest.mark.parametrize("name", ["ViT-B/32", "RN50", "ViT-L-14-CLIPA", "ViT-B-16-SigLIP"])
def test_flops_agree_with_the_compilers_count(name):
    config = MODELS[name]
    # The activation is not counted, but the compiler counts an erf as seventy operations.
    text = dataclasses.replace(config.text, activation="quick_gelu")
    config = dataclasses.replace(config, text=text)
    if isinstance(config.vision, ViTConfig):
        vision = dataclasses.replace(config.vision, activation="quick_gelu")
        config = dataclasses.replace(config, vision=vision)
    model, size = CLIP(config), config.vision.image_size
    variables, length = full_size_shapes(name), config.text.context_length

    def counted(method, *shape, dtype):
        x = jax.ShapeDtypeStruct(shape, dtype)
        lowered = jax.jit(lambda v, x: model.apply(v, x, method=method)).lower(variables, x)
        return lowered.cost_analysis()["flops"]

    image = counted("encode_image", 1, size, size, 3, dtype=jnp.float32)
    text = counted("encode_text", 1, length, dtype=jnp.int32)
    # The compiler counts element-wise operations too, and leaves out the products with a
    # convolution's zero padding, 3 % of a ResNet's.
    assert image_flops(config) == pytest.approx(image, rel=0.035)
    assert text_flops(config, length) == pytest.approx(text, rel=0.01)


def test_patches_may_move_with_their_positions():
    """The class token is pooled: moving patches with their positions changes nothing."""
    config = VIT.vision
    model = VisionTransformer(config, 16)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    flipped = images.reshape(2, 4, 8, 32, 3)[:, ::-1].reshape(2, 32, 32, 3)
    positions = variables["params"]["positional_embedding"]
    grid = positions[1:].reshape(4, 4, -1)[::-1].reshape(16, -1)
    moved = {**variables["params"], "positional_embedding": jnp.vstack([positions[:1], grid])}
    a = model.apply(variables, images)
    b = model.apply({"params": moved}, flipped)
    # The same sums in another order: a few float32 epsilons of values around 1.
    np.testing.assert_allclose(a, b, atol=2e-6)
