"""ONNX files run by onnxruntime: each form of a primitive, a tower of each family, the command."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from tiny import RESNET, SIGLIP, VIT  # noqa: E402

from clip_jax.api import LoadedCLIP  # noqa: E402
from clip_jax.data.images import OPENAI  # noqa: E402
from clip_jax.errors import UserError  # noqa: E402
from clip_jax.exporting import check  # noqa: E402
from clip_jax.exporting.check import CAPTIONS, sample_images  # noqa: E402
from clip_jax.exporting.onnx_file import make_graph, make_message, runner  # noqa: E402
from clip_jax.exporting.tower import tower_program  # noqa: E402
from clip_jax.models.clip import CLIPConfig  # noqa: E402
from clip_jax.models.convnext import ConvNeXtConfig  # noqa: E402
from clip_jax.models.fastvit import FastViTConfig  # noqa: E402
from clip_jax.models.vit import ViTConfig  # noqa: E402
from clip_jax.models.zoo import MODELS  # noqa: E402
from clip_jax.pretrained.trees import array_shapes, to_variables  # noqa: E402
from clip_jax.pretrained.work_folder import RunDescription, write_work_folder  # noqa: E402
from clip_jax.tokenizers import TokenizerSpec  # noqa: E402
from clip_jax.tools.export import export_model, parse  # noqa: E402


def run_onnx(tmp_path, function, arrays, shape, dtype):
    """Return what onnxruntime makes of a function: a batch in, an array out."""
    batch = jax.ShapeDtypeStruct(export.symbolic_shape(shape), dtype)
    model = make_message(onnx, *make_graph(function, arrays, "batch", batch))
    onnx.checker.check_model(model, full_check=True)
    path = tmp_path / "program.onnx"
    onnx.save_model(model, path)
    return runner(onnxruntime, path)


def window_sum(x):
    window, padding = (1, 3, 3, 1), ((0, 0), (1, 1), (1, 0), (0, 0))
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1, 2, 1, 1), padding)


def convolve(x, kernel, groups=1, strides=(1, 1)):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        ((1, 1), (0, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


# Of x, float32 [batch, 4, 6, 8], and of an array w, float32 [3, 3, 8, 8].
FORMS = {
    "numbers": lambda w, x: jnp.sqrt(jnp.square(x)) - jax.lax.rsqrt(jnp.exp(-x) + 1) / 3 + x**3,
    "activations": lambda w, x: jax.nn.gelu(x, False) + jax.nn.gelu(x) + jax.nn.silu(jnp.tanh(x)),
    "masks": lambda w, x: jnp.where((x > 0) & (x <= 1) & (x != 0.5), x, -1.0) + (x == 0.5),
    "constants": lambda w, x: x + jnp.cos(jnp.arange(8.0)) * jnp.tril(w[0, 0]).sum(0),
    "sums": lambda w, x: jax.nn.softmax(x, axis=(1, 3)) + x.mean(2, keepdims=True),
    "largest": lambda w, x: jnp.argmax(x, -1)[..., None] * 1.0 + jnp.argmax(x > 0, -1)[..., None],
    "layouts": lambda w, x: jnp.stack(
        [x.reshape(len_of(x), 24, 8), x.swapaxes(1, 2).reshape(-1, 24, 8)], 2
    ),
    "joined": lambda w, x: jnp.concatenate(
        [jnp.broadcast_to(w[0, 0, 0], (len_of(x), 4, 1, 8)), x], 2
    ),
    "padded": lambda w, x: jnp.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)), constant_values=2.0),
    "cut": lambda w, x: (
        x[:, 1:, :, 2:5]
        + x[:, :-1, ::1, 1:2]
        + jax.lax.slice(x, (0, 0, 0, 0), (1, 1, 6, 8), (1, 1, 1, 3))[..., :1]
    ),
    "strided": lambda w, x: x[:, ::2, 1::2] + x[:, 0][:, None, :1],
    "products": lambda w, x: x @ w[0, 0] + jnp.einsum("bhwc,bgwc->bhgw", x, x).sum(2)[..., None],
    "heads": lambda w, x: jnp.einsum("bhwc,chd->bwhd", x, w[:, :, :4].reshape(8, 4, 9)),
    "convolved": lambda w, x: convolve(x, w, strides=(2, 1)),
    "by channel": lambda w, x: convolve(x, w[:, :, :1], groups=8),
    "windows": lambda w, x: window_sum(x),
}


def len_of(x):
    return x.shape[0]


@pytest.mark.parametrize("name", FORMS)
def test_a_form_computes_what_jax_does(name, tmp_path):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((3, 3, 8, 8)).astype(np.float32)
    x = rng.standard_normal((3, 4, 6, 8)).astype(np.float32)
    x[0, 0, 0, :2] = 0.5
    function = FORMS[name]
    run = run_onnx(
        tmp_path, lambda arrays, x: function(arrays["w"], x), {"w": w}, "b, 4, 6, 8", np.float32
    )
    for batch in (x, x[:1]):
        np.testing.assert_allclose(run(batch), jax.jit(function)(w, batch), rtol=1e-5, atol=2e-5)


def test_rows_are_gathered_from_a_table_and_from_sequences(tmp_path):
    table = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)

    def rows(arrays, ids):
        x_BLD = arrays["table"][ids]
        return jnp.take_along_axis(x_BLD, jnp.argmax(ids == 4, -1)[:, None, None], axis=1)[:, 0]

    ids = np.array([[1, 4, 0, 4], [0, 0, 0, 4]], np.int32)
    run = run_onnx(tmp_path, rows, {"table": table}, "b, 4", np.int32)
    np.testing.assert_array_equal(run(ids), table[[4, 4]])


@pytest.mark.parametrize(
    "function", [jnp.cumsum, lambda x: jax.lax.sort(x), lambda x: x[jnp.argsort(x[:, 0])]]
)
def test_what_has_no_form_is_refused_by_name(function):
    batch = jax.ShapeDtypeStruct((3, 4), np.float32)
    with pytest.raises(UserError, match=r"no form of JAX's \w+.*; give --format stablehlo"):
        make_graph(lambda arrays, x: function(x), {}, "x", batch)


# One entry of the zoo for each kind of image tower and of text tower.
FAMILIES = (
    *("ViT-B/32", "RN50", "ViT-B-16-SigLIP2-256", "ViT-L-14-CLIPA", "PE-Core-T-16-384"),
    *("EVA01-g-14", "EVA02-B-16", "EVA02-E-14", "MobileCLIP-S1", "MobileCLIP-B", "MobileCLIP2-S3"),
    *("ViTamin-S", "roberta-ViT-B-32", "nllb-clip-base", "coca_ViT-B-32", "convnext_tiny"),
    *("convnext_large_d", "convnext_xxlarge"),
)


def small_config(name: str) -> CLIPConfig:
    """Return an entry of the zoo with narrow towers of few blocks."""
    config = MODELS[name]
    vision, text = config.vision, config.text
    sizes = {"width": 64, "layers": 2, "heads": 4}
    if isinstance(vision, ViTConfig):
        small = {**sizes, "image_size": 4 * vision.patch_size}
        small |= {"pool_heads": 4} if vision.pool_heads else {}
        small |= {"mbconv_widths": (16, 32)} if vision.mbconv_widths else {}
    elif isinstance(vision, ConvNeXtConfig):
        small = {"depths": (1, 2, 1, 1), "widths": (16, 32, 48, 64), "image_size": 64}
    elif isinstance(vision, FastViTConfig):
        stages = len(vision.depths)
        small = {"depths": (1, 2, 1, 1, 1)[:stages], "widths": (16, 32, 32, 64, 64)[:stages]}
        small["image_size"] = 2 ** (stages + 2)
    else:
        small = {"layers": (1, 1, 1, 1), "width": 8, "image_size": 64}
    end = 89 if text.encoder is None else text.eot_id
    text = dataclasses.replace(text, **sizes, vocab_size=90, eot_id=end)
    vision = dataclasses.replace(vision, **small)
    return dataclasses.replace(config, embed_dim=64, vision=vision, text=text)


def random_arrays(config: CLIPConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for path, shape in array_shapes(config).items():
        x = rng.normal(0, 0.1, shape).astype(np.float32)
        arrays[path] = np.abs(1 + x) if path.endswith(("/scale", "/var", "/gamma")) else x
    return arrays


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tower_of_each_family_gives_the_models_features(name, tmp_path):
    config = small_config(name)
    clip = LoadedCLIP(name, config, to_variables(random_arrays(config)))
    rng = np.random.default_rng(0)
    size, length = config.vision.image_size, config.text.context_length
    tokens = np.zeros((3, length), np.int32)
    if config.text.encoder is not None:
        tokens += config.text.encoder.pad_id
    for row, end in zip(tokens, (9, length - 1, 4), strict=True):
        row[:end] = rng.integers(3, 88, end)
        row[end] = config.text.eot_id
    batches = {"image": rng.integers(0, 256, (3, size, size, 3)).astype(np.uint8), "text": tokens}
    for tower, batch in batches.items():
        program = tower_program(clip, tower, resizes=False, int8=False)
        run = run_onnx(
            tmp_path, program, program.arrays, ", ".join(program.dimensions), program.dtype
        )
        encode = clip.encode_image if tower == "image" else clip.encode_text
        for rows in (batch, batch[:1]):
            np.testing.assert_allclose(run(rows), encode(rows), atol=2e-6)


@pytest.fixture(scope="module", params=["vit", "resnet", "siglip"])
def run_folder(request, tmp_path_factory):
    """A small model's work folder."""
    config = {"vit": VIT, "resnet": RESNET, "siglip": SIGLIP}[request.param]
    text = dataclasses.replace(
        config.text, layers=1, context_length=16, vocab_size=49_408, eot_id=49_407
    )
    config = dataclasses.replace(config, text=text)
    folder = tmp_path_factory.mktemp("run") / "model"
    folder.mkdir()
    arrays = random_arrays(config)
    write_work_folder(folder, RunDescription("tiny", config, TokenizerSpec(), OPENAI), arrays)
    return folder, LoadedCLIP("tiny", config, to_variables(arrays), tokenizer_spec=TokenizerSpec())


def test_files_run_with_onnxruntime_alone(run_folder, tmp_path, monkeypatch):
    folder, clip = run_folder
    written = export_model(parse([str(folder), str(tmp_path / "out"), "--format", "onnx"]))
    assert all(float(values["onnxruntime_ms"]) > 0 for values in written)
    pixels = clip.preprocess(next(iter(sample_images())))
    cases = {
        "image": ("pixels", pixels, clip.encode_image(pixels)),
        "text": ("tokens", clip.tokenize(CAPTIONS), clip.encode_text(CAPTIONS)),
    }
    for tower, (name, batch, wanted) in cases.items():
        session = onnxruntime.InferenceSession(tmp_path / f"out/{tower}.onnx")
        np.testing.assert_allclose(session.run(["features"], {name: batch})[0], wanted, atol=2e-6)
        stored = session.get_modelmeta().custom_metadata_map
        assert float(stored["largest_difference"]) < 2e-6 and stored["tower"] == tower
        assert "onnxruntime_ms" not in stored


def test_int8_and_weights_beside_the_file(run_folder, tmp_path, monkeypatch):
    folder, clip = run_folder
    arguments = [str(folder), str(tmp_path / "small"), "--format", "onnx", "--int8"]
    assert all(values["weights"] == "int8" for values in export_model(parse(arguments)))
    monkeypatch.setattr("clip_jax.exporting.onnx_file.ONE_FILE", 1000)
    arguments[1:] = [str(tmp_path / "large"), "--format", "onnx", "--tower", "text"]
    export_model(parse(arguments))
    large, beside = tmp_path / "large/text.onnx", tmp_path / "large/text.onnx.data"
    assert large.stat().st_size < 0.3 * beside.stat().st_size
    whole = large.stat().st_size + beside.stat().st_size
    assert (tmp_path / "small/text.onnx").stat().st_size < 0.3 * whole
    session = onnxruntime.InferenceSession(large)
    z_BD = session.run(None, {"tokens": clip.tokenize(CAPTIONS)})[0]
    np.testing.assert_allclose(z_BD, clip.encode_text(CAPTIONS), atol=2e-6)
    monkeypatch.setitem(check.BOUNDS, "float32", 1e-12)
    arguments[1] = str(tmp_path / "none")
    with pytest.raises(UserError, match="may by 1e-12; nothing was written"):
        export_model(parse(arguments))
    assert not (tmp_path / "none").exists()
