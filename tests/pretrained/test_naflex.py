"""SigLIP 2 NaFlex: images of any shape; values against transformers are in tests/parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naflex_folder import PATCHES, SIDE, write_naflex
from pairs import NAMES, write_data
from PIL import Image
from tiny import VIT

import clip_jax
from clip_jax.api import LoadedCLIP
from clip_jax.config import default, resolve
from clip_jax.data.patches import PatchShape, patch_grid
from clip_jax.data.shards import Handles
from clip_jax.embeddings.write import open_images
from clip_jax.errors import UserError
from clip_jax.exporting.tower import tower_program
from clip_jax.models.naflex import ImagePatches, grid_positions
from clip_jax.pretrained.export import write_hf, write_open_clip
from clip_jax.pretrained.load import read_checkpoint
from clip_jax.pretrained.resize import resize_checkpoint
from clip_jax.pretrained.trees import array_shapes, to_variables
from clip_jax.pretrained.work_folder import RunDescription
from clip_jax.tools import embed
from clip_jax.tools.convert import convert
from clip_jax.training.setup import build_run
from clip_jax.typing import leaves_by_path

SIZES = [(30, 50), (40, 8), (5, 77), (16, 16)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("pairs"), shards=1, samples=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data):
    folder = write_naflex(tmp_path_factory.mktemp("naflex"))
    (folder / "tokenizer.model").write_bytes((data[0] / "t.model").read_bytes())
    return folder


@pytest.fixture(scope="module")
def clip(folder):
    return clip_jax.load(folder, tokenizer=str(folder / "tokenizer.model"))


def images(seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (*s, 3)).astype(np.uint8)) for s in SIZES]


def test_grids_keep_the_proportions_within_the_limit():
    assert patch_grid(640, 480, PatchShape(16, 256)) == (14, 18)
    assert patch_grid(480, 640, PatchShape(16, 256)) == (18, 14)
    assert patch_grid(512, 512, PatchShape(16, 1024)) == (32, 32)
    assert patch_grid(9000, 1, PatchShape(16, 256)) == (1, 256)
    assert patch_grid(1, 1, PatchShape(16, 256)) == (7, 7)  # a hundred times as large, no more


def test_positions_are_the_learned_ones_at_their_own_grid_and_filtered_elsewhere():
    table = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    grids = np.array([[3, 3], [2, 6], [7, 1]])
    found = jax.jit(grid_positions, static_argnums=2)(jnp.asarray(table), jnp.asarray(grids), 12)
    np.testing.assert_allclose(found[0, :9], table, atol=1e-6)
    for positions, (rows, columns) in zip(np.asarray(found), grids.tolist(), strict=True):
        down, across = triangle(3, rows), triangle(3, columns)
        expected = np.einsum("IH,JW,HWD->IJD", down, across, table.reshape(3, 3, 5))
        count = rows * columns
        np.testing.assert_allclose(positions[:count], expected.reshape(count, 5), atol=1e-6)
    assert np.isfinite(found).all()


def triangle(old, new):
    """Weights [new, old] of a linear filter, wider where there are fewer new points."""
    scale = old / new
    centres = (np.arange(new) + 0.5) * scale - 0.5
    distance = np.abs(np.arange(old) - centres[:, None]) / max(scale, 1)
    weights = np.maximum(1 - distance, 0)
    return weights / weights.sum(axis=1, keepdims=True)


def test_preprocess_gives_patches_mask_and_grid(clip):
    batch = clip.preprocess(images())
    assert isinstance(batch, ImagePatches)
    assert batch.patches.shape == (4, PATCHES, SIDE * SIDE * 3) and batch.patches.dtype == np.uint8
    assert batch.grid.tolist() == [[3, 4], [6, 2], [1, 12], [3, 3]]
    assert batch.mask.sum(axis=1).tolist() == [12, 12, 12, 9]
    # An image of whole patches is not resized.
    square = np.asarray(images()[3])[:12, :12]
    (patches,), (mask,), _ = clip.preprocess(square)
    expected = square.reshape(3, SIDE, 3, SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(9, -1)
    np.testing.assert_array_equal(patches[mask], expected)
    assert clip.preprocess(images(), max_patches=40).patches.shape[1] == 40
    with pytest.raises(UserError, match="max_patches is 0: it must be a whole number"):
        clip.preprocess(images(), max_patches=0)


def test_shapes_need_no_program_of_their_own_and_what_fills_is_not_seen(clip):
    one = clip.preprocess(images())
    z = np.asarray(clip.encode_image(one))
    programs = clip._encode_image._cache_size()
    np.testing.assert_array_equal(clip.encode_image(images()), z)
    turned = clip.preprocess([image.rotate(90, expand=True) for image in images(1)])
    clip.encode_image(turned)
    order = [2, 0, 3, 1]
    shuffled = ImagePatches(*(array[order] for array in one))
    np.testing.assert_allclose(clip.encode_image(shuffled), z[order], atol=1e-6)
    filled = one._replace(patches=np.where(one.mask[..., None], one.patches, 255))
    np.testing.assert_array_equal(clip.encode_image(filled), z)
    assert clip._encode_image._cache_size() == programs
    longer = clip.preprocess(images()[3], max_patches=PATCHES)
    more = ImagePatches(
        np.pad(longer.patches, ((0, 0), (0, 20), (0, 0))),
        np.pad(longer.mask, ((0, 0), (0, 20))),
        longer.grid,
    )
    np.testing.assert_allclose(clip.encode_image(more), z[3:], atol=1e-6)


def test_what_is_done_with_a_loaded_model(clip, folder, tmp_path):
    shares = clip.classify(images(), ["a cat", "a dog"])
    assert shares.shape == (4, 2) and clip.is_sigmoid
    states = clip.image_states(images(), blocks=[0, -1])
    assert states.rows_BLD.shape == (4, PATCHES, 16) and len(states.blocks) == 2
    half = clip_jax.load(folder, dtype="bfloat16", towers="image")
    z = np.asarray(clip.encode_image(images()))
    assert np.abs(half.encode_image(images()) - z).max() < 0.05
    convert(str(folder), str(tmp_path / "own"), to="own", tokenizer=clip.tokenizer_spec.file)
    again = clip_jax.load(tmp_path / "own")
    assert again.config == clip.config and again.preprocessing == clip.preprocessing
    for name, array in leaves_by_path(clip.params).items():
        np.testing.assert_array_equal(leaves_by_path(again.params)[name], array)


def test_embeddings_are_the_models_own(data, folder, tmp_path, clip):
    flags = ["--model", str(folder), "--tokenizer", str(folder / "tokenizer.model")]
    flags += ["--data", data[1], "--out", str(tmp_path / "out"), "--batch-size", "8"]
    assert embed.main(flags) == 0
    (path,) = (tmp_path / "out" / "img_emb").iterdir()
    found = np.load(path).astype(np.float32)
    (shard,) = open_images(data[1])
    with Handles() as handles:
        shown = [shard.image(i, handles) for i in range(len(shard))]
    np.testing.assert_allclose(found, clip.encode_image(shown), atol=1e-3)
    assert len(NAMES) == len(found)


def test_what_it_cannot_do_is_one_line(clip, folder, tmp_path, data):
    batch = clip.preprocess(images())
    floats = np.zeros((1, 12, 12, 3), np.float32)
    config = default()
    config.model.name, config.model.init_from = "ViT-48", str(folder)
    config.data.train, config.data.tokenizer = data[1], str(folder / "tokenizer.model")
    config.train.batch_size, config.train.steps = 8, 1
    checkpoint = read_checkpoint(folder)
    zeros = {path: np.zeros(shape, np.float32) for path, shape in array_shapes(VIT).items()}
    square = LoadedCLIP("tiny", VIT, to_variables(zeros))
    arrays = {path: np.asarray(read()) for path, read in checkpoint.arrays.items()}
    described = RunDescription("x", checkpoint.config, None, checkpoint.preprocess)
    cases = {
        "which have no map": lambda: clip.relevance(batch, "a cat"),
        "only its text tower is exported": lambda: tower_program(
            clip, "image", resizes=True, int8=False
        ),
        "takes images of any shape": lambda: resize_checkpoint(checkpoint, 64, None),
        "takes images, or the patches": lambda: clip.encode_image(floats),
        "a mask that is not that of its grid": lambda: clip.encode_image(
            batch._replace(mask=~batch.mask)
        ),
        "takes patches of": lambda: clip.encode_image(
            batch._replace(patches=batch.patches[..., 1:])
        ),
        "takes a mask of": lambda: clip.encode_image(batch._replace(grid=batch.grid[:1])),
        "squares of 32 pixels and got patches": lambda: square.encode_image(batch),
        "give max_patches to SigLIP 2 NaFlex alone": lambda: square.preprocess(
            images(), max_patches=9
        ),
        "not trained": lambda: build_run(resolve(config), str(tmp_path / "run")),
        "open_clip has no such image tower": lambda: write_open_clip(tmp_path, described, arrays),
        "transformers has no such image tower": lambda: write_hf(tmp_path, described, arrays),
        "have grids of their own": lambda: clip.image_states(images(), blocks=[0, -1]).grid(),
    }
    for message, call in cases.items():
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "patch_size is 5 and that of the model"),
        ({"max_num_patches": 0}, "max_num_patches is 0"),
        ({"image_processor_type": "SiglipImageProcessor"}, "not that of the model"),
    ],
)
def test_a_processor_of_another_model_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_checkpoint(write_naflex(tmp_path, **changes))


def test_the_number_of_patches_is_the_folders(tmp_path, clip):
    more = read_checkpoint(write_naflex(tmp_path, max_num_patches=20)).config
    assert dataclasses.replace(more.vision, max_patches=PATCHES) == clip.config.vision
