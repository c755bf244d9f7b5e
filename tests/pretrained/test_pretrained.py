"""Published checkpoints without their libraries: golden files, round trips, damage, mistakes."""

import dataclasses
import json
import random
import shutil
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import CLIPA, RESNET, SIGLIP, TINY, VIT

import clip_jax
from clip_jax.data.images import OPENAI, Preprocess
from clip_jax.data.images import SIGLIP as SIGLIP_PREPROCESS
from clip_jax.errors import UserError
from clip_jax.models import zoo
from clip_jax.parallel.mesh import make_mesh
from clip_jax.pretrained.layouts import export_arrays, import_arrays
from clip_jax.pretrained.load import read_checkpoint
from clip_jax.pretrained.tags import find_pretrained, list_pretrained
from clip_jax.pretrained.trees import array_shapes, from_variables, to_variables
from clip_jax.pretrained.work_folder import RunDescription, write_work_folder
from clip_jax.tokenizers import train_sentencepiece
from clip_jax.tools.convert import ConvertedModel, convert
from clip_jax.tools.convert import main as convert_main

GOLDEN = Path(__file__).parents[1] / "golden" / "published"
FILES = {
    "openai": GOLDEN / "openai" / "model.pt",
    "open_clip": GOLDEN / "open_clip",
    "hf_clip": GOLDEN / "hf_clip",
    "hf_siglip": GOLDEN / "hf_siglip",
}


def random_arrays(config):
    """Return random arrays by path, each one different everywhere."""
    rng = np.random.default_rng(0)
    return {
        path: rng.standard_normal(shape).astype(np.float32)
        for path, shape in array_shapes(config).items()
    }


def write_random(folder, config):
    """Write a work folder of a model with random arrays; return its variables."""
    folder.mkdir()
    arrays = random_arrays(config)
    write_work_folder(folder, RunDescription("tiny", config, None), arrays)
    return to_variables(arrays)


def without_layer_scale(config):
    """Return a SigLIP as its libraries have it."""
    vision = dataclasses.replace(config.vision, layer_scale=None)
    return dataclasses.replace(config, vision=vision)


@pytest.mark.parametrize("name", FILES)
def test_features_are_the_librarys(name):
    """On files and features that the genuine library wrote (make_published_files.py)."""
    with np.load(GOLDEN / "features.npz") as golden:
        images, tokens = golden["images"], golden["tokens"]
        want_image, want_text = golden[f"{name}_image"], golden[f"{name}_text"]
    clip = clip_jax.load(FILES[name])
    # Float32 sums in another order on unit vectors of 16 numbers; measured at 2e-7.
    np.testing.assert_allclose(clip.encode_image(images), want_image, atol=1e-6)
    np.testing.assert_allclose(clip.encode_text(tokens), want_text, atol=1e-6)


def test_what_belongs_to_the_weights_comes_with_them():
    openai, open_clip = clip_jax.load(FILES["openai"]), clip_jax.load(FILES["open_clip"])
    siglip = clip_jax.load(FILES["hf_siglip"])
    assert openai.config.vision.activation == openai.config.text.activation == "quick_gelu"
    assert open_clip.config.vision.activation == open_clip.config.text.activation == "gelu"
    assert siglip.config.vision.activation == "gelu_tanh"
    assert openai.preprocessing == OPENAI
    half, quarter = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    assert open_clip.preprocessing == Preprocess("squash", "bicubic", half, quarter)
    assert siglip.preprocessing == SIGLIP_PREPROCESS
    assert siglip.params["logit_bias"].shape == siglip.params["logit_scale"].shape == ()
    # Under any name.
    named = clip_jax.load(FILES["openai"], model="ViT-B-32")
    assert named.config == openai.config


def test_a_model_without_its_tokenizer_says_so(tmp_path):
    clip = clip_jax.load(FILES["hf_siglip"])
    with pytest.raises(UserError, match=r"came without its tokenizer.*tokenizer\.json"):
        clip.tokenize("a dog")
    with pytest.raises(UserError, match=r"encode_text takes \[batch, 10\]"):
        clip.encode_text(np.zeros((1, 6), np.int32))


def test_a_given_tokenizer_is_used_as_the_family_was_trained_with_it(tmp_path):
    """SigLIP's captions lose their punctuation and are padded with the end token."""
    captions = ["a dog", "two cats and a dog", "red hat"] * 9
    train_sentencepiece(captions, tmp_path / "x.model", 273)
    clip = clip_jax.load(FILES["hf_siglip"], tokenizer=str(tmp_path / "x.model"))
    assert clip.tokenizer_spec.clean == "canonicalize"
    assert clip.tokenize("A dog!").tolist() == clip.tokenize("a dog").tolist()
    assert clip.tokenize("a dog").shape == (1, 10)
    with pytest.raises(
        UserError, match=r"cannot read the SentencePiece model .*nowhere\.model.*name"
    ):
        clip_jax.load(FILES["hf_siglip"], tokenizer=str(tmp_path / "nowhere.model"))


@pytest.mark.parametrize(
    ("config", "naming"),
    [
        (VIT, "openai"),
        (VIT, "open_clip_nested"),
        (CLIPA, "openai"),
        (RESNET, "openai_resnet"),
        (RESNET, "open_clip_nested_resnet"),
        (VIT, "hf_clip"),
        (without_layer_scale(SIGLIP), "open_clip_siglip"),
        (without_layer_scale(SIGLIP), "hf_siglip"),
        (without_layer_scale(SIGLIP), "big_vision"),
    ],
)
def test_there_and_back_is_the_same_bits(config, naming):
    arrays = random_arrays(config)
    exported = export_arrays(arrays, naming)
    assert sum(x.size for x in exported.values()) == sum(x.size for x in arrays.values())
    back = import_arrays(exported, array_shapes(config), naming, "test")
    assert back.keys() == arrays.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(back[path](), array, err_msg=path)


@pytest.mark.parametrize("scanned", [False, True])
def test_big_vision_file(tmp_path, scanned):
    """Under big_vision's names, layers one by one or stacked as its scan keeps them."""
    config = without_layer_scale(SIGLIP)
    arrays = random_arrays(config)
    exported = export_arrays(arrays, "big_vision")
    for name in ("params/t", "params/b"):
        exported[name] = exported[name].reshape(1)
    if scanned:
        stacked, depth = {}, config.vision.layers
        assert depth == config.text.layers > 1
        for name in list(exported):
            if "encoderblock_0/" in name:
                names = [name.replace("block_0/", f"block_{i}/") for i in range(depth)]
                layers = [exported.pop(name) for name in names]
                stacked[name.replace("encoderblock_0/", "encoderblock/")] = np.stack(layers)
        exported |= stacked
    np.savez(tmp_path / "siglip.npz", **exported)
    clip = clip_jax.load(tmp_path / "siglip.npz")
    # big_vision cuts images to whole patches: 32 of these 33 pixels.
    assert clip.config.vision.image_size == 32
    assert (clip.config.vision.heads, clip.config.text.heads) == (4, 4)
    assert clip.config.vision.mlp_width == config.vision.mlp_width
    chex.assert_trees_all_equal(from_variables(clip.params, clip.batch_stats), arrays)


@pytest.mark.parametrize("name", ["vit", "resnet", "clipa", "siglip"])
def test_own_format_and_back(tmp_path, name):
    variables = write_random(tmp_path / "folder", TINY[name])
    converted = convert(str(tmp_path / "folder"), str(tmp_path / "own"), to="own")
    size = sum(x.size for x in jax.tree.leaves(variables))
    assert converted == ConvertedModel(str(tmp_path / "own"), "tiny", "own", size)
    clip = clip_jax.load(tmp_path / "own")
    assert clip.config == TINY[name]
    loaded = {"params": clip.params, "batch_stats": clip.batch_stats}
    chex.assert_trees_all_equal(loaded, variables)


def test_over_a_mesh_every_array_lies_by_the_rules():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    clip = clip_jax.load(FILES["open_clip"], mesh=mesh)
    kernel = clip.params["text"]["transformer"]["resblocks_0"]["mlp"]["c_fc"]["kernel"]
    assert kernel.sharding.spec == jax.P("fsdp", "tensor")
    alone = clip_jax.load(FILES["open_clip"])
    chex.assert_trees_all_equal(clip.params, alone.params)


def test_another_size_keeps_the_class_token_and_means_over_the_grid():
    small = clip_jax.load(FILES["open_clip"])
    large = clip_jax.load(FILES["open_clip"], image_size=32)
    assert large.config.vision.image_size == 32 and large.config.vision.grid_size == 4
    before = np.asarray(small.params["visual"]["positional_embedding"])
    after = np.asarray(large.params["visual"]["positional_embedding"])
    assert after.shape == (17, 32)
    np.testing.assert_array_equal(after[0], before[0])
    assert large.encode_image(np.zeros((1, 32, 32, 3), np.uint8)).shape == (1, 16)
    short = clip_jax.load(FILES["open_clip"], context_length=6)
    assert short.params["text"]["positional_embedding"].shape == (6, 32)
    for sizes, message in (
        ({"image_size": 4}, "not a multiple of 8"),
        ({"context_length": 11}, "not between 2 and the checkpoint's 10"),
    ):
        with pytest.raises(UserError, match=message):
            clip_jax.load(FILES["open_clip"], **sizes)


def copy_published(name, tmp_path):
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    return folder


def edit_weights(folder, edit):
    """Apply `edit(arrays)` to a folder's weights; return the folder."""
    (path,) = folder.glob("*.safetensors")
    arrays = load_file(path)
    edit(arrays)
    save_file(arrays, path)
    return folder


def test_keys_and_shapes_that_do_not_fit_are_named(tmp_path):
    def lacking(arrays):
        arrays["strange.weight"] = arrays.pop("visual.ln_post.weight")

    with pytest.raises(UserError) as caught:
        clip_jax.load(edit_weights(copy_published("open_clip", tmp_path), lacking))
    line = str(caught.value)
    assert "lacks visual.ln_post.weight" in line and "no use for strange.weight" in line

    def reshaped(arrays):
        arrays["visual_projection.weight"] = arrays["visual_projection.weight"].T.copy()

    with pytest.raises(UserError, match=r"visual_projection\.weight has the shape \[32, 16\]"):
        clip_jax.load(edit_weights(copy_published("hf_clip", tmp_path), reshaped))


def test_an_array_that_is_there_twice_is_refused(tmp_path):
    def doubled(arrays):
        arrays["module.visual.proj"] = arrays["visual.proj"] + 1

    with pytest.raises(UserError, match="some arrays twice"):
        clip_jax.load(edit_weights(copy_published("open_clip", tmp_path), doubled))


def test_a_bare_file_has_to_be_named(tmp_path):
    bare = tmp_path / "weights.safetensors"
    shutil.copy(GOLDEN / "open_clip" / "open_clip_model.safetensors", bare)
    with pytest.raises(UserError, match="no registered model has its sizes; the nearest is"):
        clip_jax.load(bare)
    with pytest.raises(UserError, match=r"does not hold a ViT-B-32.*nearest to"):
        clip_jax.load(bare, model="ViT-B-32")
    with pytest.raises(UserError, match="no such pretrained pair"):
        clip_jax.load(bare, model="ViT-B-32:openia")
    with pytest.raises(UserError, match="no model is called"):
        clip_jax.load(bare, model="ViT-B-33")
    hf = tmp_path / "x.safetensors"
    shutil.copy(GOLDEN / "hf_clip" / "model.safetensors", hf)
    with pytest.raises(UserError, match=r"need their config\.json; give the folder"):
        clip_jax.load(hf)


def test_weights_that_do_not_say_their_activation_are_refused(tmp_path, monkeypatch):
    bare = tmp_path / "weights.safetensors"
    shutil.copy(GOLDEN / "open_clip" / "open_clip_model.safetensors", bare)
    config = clip_jax.load(FILES["open_clip"]).config
    quick = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, activation="quick_gelu"),
        text=dataclasses.replace(config.text, activation="quick_gelu"),
    )
    monkeypatch.setitem(zoo.MODELS, "tiny", config)
    assert clip_jax.load(bare).config == config
    monkeypatch.setitem(zoo.MODELS, "tiny-quickgelu", quick)
    with pytest.raises(UserError, match=r"which activation.*model= one of tiny, tiny-quickgelu"):
        clip_jax.load(bare)
    assert clip_jax.load(bare, model="tiny-quickgelu").config == quick


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"vision_cfg": {"attentional_pool": "cascade"}}, "attentional_pool': 'cascade"),
        ({"text_cfg": {"hf_model_name": "google/mt5-base"}}, "text tower google/mt5-base is not"),
        ({"vision_cfg": {"timm_model_name": "swin_tiny"}}, "swin_tiny of timm is not"),
        ({"vision_cfg": {"width": "wide"}}, "model_cfg is damaged"),
        ({"embed_dim": None}, "model_cfg is damaged"),
    ],
)
def test_open_clip_settings_that_we_do_not_have_are_refused_by_name(tmp_path, edit, message):
    folder = copy_published("open_clip", tmp_path)
    path = folder / "open_clip_config.json"
    values = json.loads(path.read_text())
    for key, value in edit.items():
        section = values["model_cfg"].get(key)
        values["model_cfg"][key] = section | value if isinstance(section, dict) else value
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        clip_jax.load(folder)


def test_other_kinds_of_folders_are_refused(tmp_path):
    folder = copy_published("hf_clip", tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has a config but no weights"):
        clip_jax.load(folder)
    (folder / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(UserError, match="model_type is 'blip'; supported are clip"):
        clip_jax.load(folder)
    with pytest.raises(UserError, match="does not exist"):
        clip_jax.load(tmp_path / "nowhere")
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(UserError, match=r"give a \.pt"):
        clip_jax.load(tmp_path / "x.txt")


def damage(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip a few bits near the start or end, or put a piece in another's place."""
    kind = rng.randrange(3)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    damaged = bytearray(data)
    if kind == 1:
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(min(len(data), 3000))
            damaged[-place - 1 if rng.random() < 0.5 else place] ^= 1 << rng.randrange(8)
        return bytes(damaged)
    size, limit = rng.randint(1, 40), min(len(data), 4000) - 40
    source, target = rng.randrange(limit), rng.randrange(limit)
    damaged[target : target + size] = data[source : source + size]
    return bytes(damaged)


@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoints_give_one_line_or_the_whole_model(tmp_path, name):
    """60 of each format: no hang, no other exception, no part of a model."""
    rng = random.Random(name)
    folder = copy_published(name, tmp_path)
    files = sorted(path for path in folder.iterdir() if path.suffix != ".json")
    files += sorted(folder.glob("*.json"))
    whole = {path: path.read_bytes() for path in files}
    refused = 0
    for _ in range(60):
        path = rng.choice(files)
        path.write_bytes(damage(whole[path], rng))
        try:
            checkpoint = read_checkpoint(folder / "model.pt" if name == "openai" else folder)
            shapes = {path: read().shape for path, read in checkpoint.arrays.items()}
            # Damage to numbers alone, or to a size that the config's own arrays then have.
            assert shapes == array_shapes(checkpoint.config)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000
        path.write_bytes(whole[path])
    assert refused > 20


def test_converting_writes_whole_folders_or_none(tmp_path):
    target = tmp_path / "there"
    target.mkdir()
    (target / "precious").touch()
    with pytest.raises(UserError, match="holds something already"):
        convert(str(FILES["open_clip"]), str(target))
    assert [p.name for p in target.iterdir()] == ["precious"]

    write_random(tmp_path / "resnet", RESNET)
    with pytest.raises(UserError, match="transformers has no such image tower"):
        convert(str(tmp_path / "resnet"), str(tmp_path / "hf"), to="hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["resnet", "there"]


@pytest.mark.parametrize("to", ["own", "open_clip", "hf"])
def test_convert_command(tmp_path, monkeypatch, capsys, to):
    arguments = [str(FILES["hf_clip"]), str(tmp_path / "out"), "--to", to]
    monkeypatch.setattr(sys, "argv", ["convert", *arguments])
    assert convert_main() == 0
    assert f"in the format {to}" in capsys.readouterr().out
    again, clip = clip_jax.load(tmp_path / "out"), clip_jax.load(FILES["hf_clip"])
    chex.assert_trees_all_equal(again.params, clip.params)
    assert again.config == clip.config and again.preprocessing == clip.preprocessing


def test_pretrained_pairs():
    pairs = list_pretrained()
    assert len(pairs) == len(set(pairs)) == 196
    assert {find_pretrained(*pair).model for pair in pairs} <= set(clip_jax.list_models())
    assert find_pretrained("ViT-B-32", "metaclip_400m").model == "ViT-B-32-quickgelu"
    assert find_pretrained("ViT-B-32", "laion2b_e16").model == "ViT-B-32"
    assert find_pretrained("ViT-B-32-quickgelu", "laion2b_e16") is None
