"""SigLIP 2 NaFlex against transformers: a folder it wrote, its processor, its `Siglip2Model`."""

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from published import move  # noqa: E402

import clip_jax  # noqa: E402
from clip_jax.models.naflex import ImagePatches  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
LIMIT = 1e-5
SIZES = [(40, 60), (300, 20), (7, 900), (64, 64), (1, 1), (333, 517), (100, 99)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Siglip2Model of random weights with its processor, as transformers saves them."""
    folder = tmp_path_factory.mktemp("naflex")
    sizes = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4}
    config = transformers.Siglip2Config(
        text_config={**sizes, "vocab_size": 99, "max_position_embeddings": 16},
        vision_config={**sizes, "num_patches": 49, "patch_size": 8},
    )
    torch.manual_seed(0)
    move(transformers.Siglip2Model(config)).save_pretrained(folder)
    processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=30)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(folder):
    return clip_jax.load(folder)


@pytest.fixture(scope="module")
def model(folder):
    return transformers.Siglip2Model.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*s, 3)).astype(np.uint8)) for s in SIZES]


def processed(folder, images, count):
    processor = transformers.Siglip2ImageProcessorPil.from_pretrained(folder)
    return processor(images, max_num_patches=count, return_tensors="pt")


@pytest.mark.parametrize("count", [30, 256, 576, 1024])
def test_patches_are_the_processors(folder, clip, images, count):
    there = processed(folder, images, count)
    here = clip.preprocess(images, max_patches=None if count == 30 else count)
    np.testing.assert_array_equal(here.grid, there["spatial_shapes"])
    np.testing.assert_array_equal(here.mask, there["pixel_attention_mask"] != 0)
    # Its bytes, but for what fills: there that is zero after the normalization.
    bytes_there = np.rint((there["pixel_values"].numpy() + 1) * 127.5)
    np.testing.assert_array_equal(here.patches[here.mask], bytes_there[here.mask])
    np.testing.assert_allclose(
        (here.patches / 127.5 - 1)[here.mask], there["pixel_values"][here.mask], atol=LIMIT
    )


def test_every_size_has_the_processors_grid():
    from transformers.models.siglip2.image_processing_siglip2 import (
        get_image_size_for_max_num_patches,
    )

    from clip_jax.data.patches import PatchShape, patch_grid

    rng = np.random.default_rng(1)
    sides = np.exp(rng.uniform(0, np.log(9000), (300, 2))).astype(int)
    for width, height in sides.tolist():
        for count in (1, 7, 256, 1024):
            found = get_image_size_for_max_num_patches(height, width, 16, count)
            grid = patch_grid(width, height, PatchShape(16, count))
            assert (grid[0] * 16, grid[1] * 16) == found


@pytest.mark.parametrize("count", [30, 256, 1024])
def test_features_and_states_are_transformers(folder, clip, model, images, count):
    there = processed(folder, images, count)
    with torch.no_grad():
        out = model.vision_model(**there)
    here = clip.preprocess(images, max_patches=count)
    z_BD = np.asarray(clip.encode_image(here))
    np.testing.assert_allclose(z_BD, unit(out.pooler_output), atol=LIMIT)
    # The processor's own tensors can be given.
    given = ImagePatches(
        there["pixel_values"].numpy(),
        there["pixel_attention_mask"].numpy(),
        there["spatial_shapes"].numpy(),
    )
    np.testing.assert_allclose(clip.encode_image(given), z_BD, atol=1e-6)
    states = clip.image_states(here)
    rows = out.last_hidden_state.numpy()
    np.testing.assert_allclose(
        np.asarray(states.rows_BLD)[here.mask], rows[here.mask], atol=10 * LIMIT
    )
    np.testing.assert_allclose(states.pooled_BD, out.pooler_output, atol=10 * LIMIT)


def test_texts_and_logits_are_transformers(folder, clip, model, images):
    tokens = np.random.default_rng(0).integers(2, 99, (3, 16))
    inputs = processed(folder, images, 30)
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(tokens), **inputs)
    np.testing.assert_allclose(clip.encode_text(tokens), out.text_embeds, atol=LIMIT)
    logits = clip.logits(clip.preprocess(images), tokens)
    np.testing.assert_allclose(logits, out.logits_per_image, atol=10 * LIMIT)
    expected = torch.sigmoid(out.logits_per_image)
    np.testing.assert_allclose(clip.probabilities(images, tokens), expected, atol=LIMIT)


def unit(z):
    return torch.nn.functional.normalize(z, dim=-1).numpy()
