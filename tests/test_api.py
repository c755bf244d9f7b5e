"""Test the public API on random weights and on a work folder."""

import dataclasses

import jax
import numpy as np
import pytest
from data_cases import ToyTokenizer
from PIL import Image
from tiny import RESNET, SIGLIP, VIT

import clip_jax
from clip_jax.api import LoadedCLIP
from clip_jax.errors import UserError
from clip_jax.models import zoo
from clip_jax.models.target import Target
from clip_jax.parallel.mesh import make_mesh
from clip_jax.pretrained.trees import array_shapes, to_variables
from clip_jax.pretrained.work_folder import (
    RunDescription,
    model_from_json,
    model_to_json,
    read_description,
    write_description,
    write_work_folder,
)
from clip_jax.tokenizers import TokenizerSpec


@pytest.fixture(scope="module", params=["vit", "resnet"])
def clip(request):
    # The zoo's sizes with CLIP's own vocabulary, but tiny towers.
    config = {"vit": VIT, "resnet": RESNET}[request.param]
    text = dataclasses.replace(config.text, context_length=77, vocab_size=49_408, eot_id=49_407)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(zoo.MODELS, "tiny", dataclasses.replace(config, text=text))
        yield clip_jax.create("tiny", seed=0)


def random_images(count):
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (50 + i, 70, 3)).astype(np.uint8))
        for i in range(count)
    ]


def test_notebook_lines(clip):
    images = clip.preprocess(random_images(3))
    size = clip.config.vision.image_size
    assert images.shape == (3, size, size, 3) and images.dtype == np.uint8
    tokens = clip.tokenize(["a photo of a dog", "a cat"])
    assert tokens.shape == (2, 77) and tokens.dtype == np.int32
    z_image = clip.encode_image(images, normalize=True)
    z_text = clip.encode_text(tokens, normalize=True)
    assert z_image.shape == (3, 16) and z_text.shape == (2, 16)
    for z in (z_image, z_text):
        assert z.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-6)
    assert float(clip.logit_scale) == pytest.approx(np.log(1 / 0.07))
    assert set(clip.params) == {"visual", "text", "logit_scale"}
    probabilities = clip.classify(images, ["cat", "dog"], templates=["a photo of a {}."])
    assert probabilities.shape == (3, 2)
    np.testing.assert_allclose(np.sum(probabilities, axis=1), 1, atol=1e-6)


def test_classify_is_the_softmax_of_scaled_cosines(clip):
    images = clip.preprocess(random_images(4))
    prompts = [["a {}", "the {}"], ["one {}."]][0]
    classes = []
    for name in ("cat", "dog", "car"):
        z = np.asarray(clip.encode_text(clip.tokenize([p.format(name) for p in prompts])))
        mean = z.mean(axis=0)
        classes.append(mean / np.linalg.norm(mean))
    logits = clip.scale * np.asarray(clip.encode_image(images)) @ np.array(classes).T
    want = np.exp(logits - logits.max(axis=1, keepdims=True))
    want /= want.sum(axis=1, keepdims=True)
    # Float32 cosines times a scale of 14: a few 1e-6 in a logit.
    got = clip.classify(images, ["cat", "dog", "car"], templates=prompts)
    np.testing.assert_allclose(got, want, atol=5e-6)


def test_normalized_floats_are_taken_as_they_are(clip):
    from clip_jax.data.images import IMAGE_MEAN, IMAGE_STD

    images = clip.preprocess(random_images(2))
    floats = (images.astype(np.float32) / 255 - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    a = clip.encode_image(images)
    b = clip.encode_image(floats.astype(np.float32))
    # The same float32 arithmetic on the device and in numpy, apart by a rounding or two.
    np.testing.assert_allclose(a, b, atol=2e-6)


def test_unnormalized_features_have_the_same_direction(clip):
    images = clip.preprocess(random_images(2))
    raw = np.asarray(clip.encode_image(images, normalize=False))
    unit = np.asarray(clip.encode_image(images))
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), unit, atol=1e-6)


def test_one_image_and_one_text(clip):
    assert clip.preprocess(random_images(1)[0]).shape[0] == 1
    assert clip.tokenize("a dog").shape == (1, 77)
    assert clip_jax.tokenize("a dog").tolist() == clip.tokenize("a dog").tolist()


def test_a_shorter_row_gives_the_same_text_features(clip):
    tokens = clip.tokenize(["a photo of a dog"])
    whole, trimmed = clip.encode_text(tokens), clip.encode_text(tokens[:, :16])
    np.testing.assert_allclose(whole, trimmed, atol=1e-6)


def test_wrong_shapes_are_named(clip):
    with pytest.raises(UserError, match=r"encode_image takes \[batch, \d+, \d+, 3\] and got"):
        clip.encode_image(np.zeros((1, 3, 8, 8), np.uint8))
    with pytest.raises(UserError, match="uint8 or normalized floats and got int32"):
        size = clip.config.vision.image_size
        clip.encode_image(np.zeros((1, size, size, 3), np.int32))
    with pytest.raises(UserError, match=r"encode_text takes \[batch, at most 77\]"):
        clip.encode_text(np.zeros((1, 78), np.int32))
    with pytest.raises(UserError, match="no model is called 'nope'"):
        clip_jax.create("nope")


@pytest.mark.parametrize("config", [VIT, RESNET])
def test_sizes_survive_json(config):
    assert model_from_json(model_to_json(config)) == config


def test_description_of_a_work_folder(tmp_path):
    tokenizer = tmp_path / "elsewhere.model"
    tokenizer.write_bytes(b"model")
    folder = tmp_path / "run"
    folder.mkdir()
    write_description(
        folder,
        RunDescription(
            "tiny", VIT, TokenizerSpec("sentencepiece", str(tokenizer)), config={"seed": 1}
        ),
    )
    description = read_description(folder)
    spec = TokenizerSpec("sentencepiece", str(folder / "tokenizer.model"))
    assert description == RunDescription("tiny", VIT, spec, config={"seed": 1})
    # Writing what was read must not copy the file onto itself.
    write_description(folder, description)
    assert (folder / "tokenizer.model").read_bytes() == b"model"


@pytest.mark.parametrize(
    ("text", "message"), [(None, "holds no checkpoint"), ("{", "cannot be read as JSON")]
)
def test_folders_that_are_none(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        clip_jax.load(tmp_path)


def test_a_folder_without_a_checkpoint(tmp_path):
    write_description(tmp_path, RunDescription("tiny", VIT, TokenizerSpec(), config={"seed": 1}))
    with pytest.raises(UserError, match="no checkpoint yet"):
        clip_jax.load(tmp_path)


def test_one_and_several_of_every_kind_are_the_same(clip):
    images = random_images(2)
    z_BD = clip.encode_image(clip.preprocess(images))
    arrays = [np.asarray(image) for image in images]
    prepared = list(clip.preprocess(arrays))
    for given in (images, tuple(images), prepared, clip.preprocess(arrays)):
        np.testing.assert_array_equal(clip.encode_image(given), z_BD)
    for one in (images[0], prepared[0], clip.preprocess(arrays[0])):
        np.testing.assert_allclose(clip.encode_image(one), z_BD[:1], atol=1e-6)
    texts = ["a dog", "two cats"]
    z_BD, tokens = clip.encode_text(clip.tokenize(texts)), clip.tokenize(texts)
    for given in (texts, tuple(texts), tokens, tokens.tolist()):
        np.testing.assert_array_equal(clip.encode_text(given), z_BD)
    for one in (texts[0], tokens[0], tokens[0].tolist()):
        np.testing.assert_allclose(clip.encode_text(one), z_BD[:1], atol=1e-6)
    with pytest.raises(UserError, match="takes uint8 arrays"):
        clip.preprocess(arrays[0] / 255)
    with pytest.raises(UserError, match="make them with preprocess"):
        clip.encode_image(arrays)
    with pytest.raises(UserError, match="no image"):
        clip.preprocess([])


def test_features_do_not_depend_on_the_rest_of_the_batch(clip):
    images, texts = random_images(4), ["a dog", "two cats", "", "a red bird on a tree " * 9]
    for encode, items in ((clip.encode_image, images), (clip.encode_text, texts)):
        mixed, same = np.asarray(encode(items)), np.asarray(encode([items[0]] * 4))
        np.testing.assert_array_equal(mixed[0], same[0])
        np.testing.assert_array_equal(encode(items[::-1])[::-1], mixed)


def test_logits_and_probabilities(clip):
    images, texts = random_images(2), ["a dog", "two cats", "a bird"]
    cosines = np.asarray(clip.encode_image(images)) @ np.asarray(clip.encode_text(texts)).T
    logits = clip.logits(images, texts)
    np.testing.assert_allclose(logits, clip.scale * cosines, atol=5e-6)
    shares = np.asarray(clip.probabilities(images, texts))
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-6)
    assert not clip.is_sigmoid and clip.bias == 0
    np.testing.assert_allclose(clip.classify(images, texts, ["{}"]), shares, atol=5e-6)


def random_arrays(config):
    """Return random arrays by path, small enough that no feature is lost."""
    rng = np.random.default_rng(0)
    shapes = array_shapes(config).items()
    return {path: np.asarray(rng.normal(0, 0.1, shape), np.float32) for path, shape in shapes}


def test_a_siglips_probabilities_are_its_own_sigmoids():
    config = dataclasses.replace(SIGLIP, text=dataclasses.replace(SIGLIP.text, vocab_size=100))
    arrays = random_arrays(config) | {"logit_bias": np.float32(-1)}
    clip = LoadedCLIP("tiny", config, to_variables(arrays))
    clip.tokenizer = ToyTokenizer()
    images, texts = random_images(2), ["a dog"]
    assert clip.is_sigmoid and clip.bias == -1
    cosines = np.asarray(clip.encode_image(images)) @ np.asarray(clip.encode_text(texts)).T
    want = 1 / (1 + np.exp(1 - clip.scale * cosines))
    np.testing.assert_allclose(clip.probabilities(images, texts), want, atol=1e-6)
    np.testing.assert_allclose(clip.classify(images, texts, ["{}"]), want, atol=1e-6)
    states = clip.image_states(images, [0])
    np.testing.assert_allclose(states.pooled_BD, clip.encode_image(images, False), atol=1e-6)
    assert states.grid().shape == (2, 4, 4, 48) == states.grid(states.blocks[0]).shape


def test_states_lead_to_the_features(clip):
    tokens = clip.tokenize(["a photo of a dog", "cats"])
    states = clip.text_states(tokens, [-1, 0, 2])
    assert states.rows_BLD.shape == (2, 77, 32) and len(states.blocks) == 3
    np.testing.assert_array_equal(states.blocks[0], states.blocks[2])
    ends = (tokens == 49_407).argmax(axis=1)
    np.testing.assert_allclose(states.pooled_BD, states.rows_BLD[np.arange(2), ends], atol=1e-6)
    z_BD = states.pooled_BD @ clip.params["text"]["text_projection"]
    np.testing.assert_allclose(z_BD, clip.encode_text(tokens, normalize=False), atol=1e-5)
    with pytest.raises(UserError, match="has 3 blocks, and none of number 3"):
        clip.text_states(tokens, [3])
    images = random_images(2)
    if "proj" not in clip.params["visual"]:
        states, z_BD = clip.image_states(images), clip.encode_image(images, normalize=False)
        np.testing.assert_allclose(states.pooled_BD, z_BD, atol=1e-6)
        return
    states = clip.image_states(images, blocks=[1])
    assert states.rows_BLD.shape == (2, 17, 48) and states.grid().shape == (2, 4, 4, 48)
    z_BD = states.pooled_BD @ clip.params["visual"]["proj"]
    np.testing.assert_allclose(z_BD, clip.encode_image(images, normalize=False), atol=1e-5)


def test_encoders_of_several_tpus_use_their_kernels(tmp_path, monkeypatch):
    config = dataclasses.replace(VIT, vision=dataclasses.replace(VIT.vision, layers=2, heads=6))
    write_work_folder(tmp_path, RunDescription("tiny", config, None), random_arrays(config))
    plain = clip_jax.load(tmp_path, dtype="bfloat16")
    mesh = make_mesh(data=2, fsdp=2, tensor=1, devices=jax.devices()[:4])
    tpus = Target("tpu", "v5e", mesh=mesh, batch_axes=("data", "fsdp"), interpret=True)
    monkeypatch.setattr(clip_jax.api, "mesh_target", lambda _: tpus)
    clip = clip_jax.load(tmp_path, dtype="bfloat16", mesh=mesh)
    images = plain.preprocess(random_images(4))
    traced = str(jax.make_jaxpr(clip.encode_image)(images))
    # Mosaic's kernels cannot be split by the partitioner.
    assert "pallas_call" in traced and "shard_map" in traced
    for rows in (4, 3):
        cosines = (
            np.asarray(clip.encode_image(images[:rows]))
            @ np.asarray(plain.encode_image(images[:rows])).T
        )
        # Unit features; bfloat16 rounds each product to 2^-9.
        np.testing.assert_allclose(np.diag(cosines), 1, atol=2**-9)


def test_bfloat16_and_single_towers(tmp_path):
    layers = {"layers": 1}
    config = dataclasses.replace(
        VIT,
        vision=dataclasses.replace(VIT.vision, **layers),
        text=dataclasses.replace(VIT.text, **layers),
    )
    write_work_folder(tmp_path, RunDescription("tiny", config, None), random_arrays(config))
    whole, half = clip_jax.load(tmp_path), clip_jax.load(tmp_path, dtype="bfloat16")
    images = whole.preprocess(random_images(2))
    tokens = np.array([[62, 3, 4, 63], [62, 5, 63, 0]])
    z_image_BD, z_text_BD = half.encode_image(images), half.encode_text(tokens)
    assert z_image_BD.dtype == z_text_BD.dtype == np.float32
    for z_BD, other_BD in (
        (z_image_BD, whole.encode_image(images)),
        (z_text_BD, whole.encode_text(tokens)),
    ):
        assert np.sum(np.asarray(z_BD) * np.asarray(other_BD), axis=1).min() > 0.99
    kinds = {x.dtype.name for x in jax.tree.leaves(half.params) if x.ndim > 1}
    assert kinds == {"bfloat16"} and half.logit_scale.dtype == np.float32
    # The weights lose nothing that the products would not: the same bits as from float32.
    wide = LoadedCLIP(
        "tiny", config, {"params": whole.params, "batch_stats": whole.batch_stats}, dtype="bfloat16"
    )
    np.testing.assert_array_equal(wide.encode_text(tokens), z_text_BD)
    for tower, other, encode in (("image", "text", "encode_text"), ("text", "image", None)):
        clip = clip_jax.load(tmp_path, towers=tower)
        assert set(clip.params) == {{"image": "visual", "text": "text"}[tower], "logit_scale"}
        with pytest.raises(UserError, match=f"loaded without its {other} tower"):
            clip.encode_text(tokens) if encode else clip.encode_image(images)
    np.testing.assert_array_equal(clip.encode_text(tokens), whole.encode_text(tokens))
    with pytest.raises(UserError, match="dtype is 'float16'; it must be one of float32, bfloat16"):
        clip_jax.load(tmp_path, dtype="float16")
