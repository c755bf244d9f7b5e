"""Test the public API on random weights and on a work folder."""

import numpy as np
import pytest
from PIL import Image
from tiny import RESNET, VIT

import clip_jax
from clip_jax.errors import UserError
from clip_jax.models import zoo
from clip_jax.pretrained.work_folder import (
    RunDescription,
    model_from_json,
    model_to_json,
    read_description,
    write_description,
)
from clip_jax.tokenizers import TokenizerSpec


@pytest.fixture(scope="module", params=["vit", "resnet"])
def clip(request):
    # The zoo's sizes with CLIP's own vocabulary, but tiny towers.
    import dataclasses

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
