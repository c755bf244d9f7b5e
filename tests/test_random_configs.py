"""Configs of strangers are taken or refused in one line, whatever stands in them."""

import json
import random
from pathlib import Path

import ml_collections
import pytest
from random_configs import mutated

from clip_jax.config import default, resolve
from clip_jax.errors import UserError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.sizes import check_layers
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.models.zoo import MODELS
from clip_jax.pretrained.hf_config import config_from_hf
from clip_jax.pretrained.open_clip_config import config_from_open_clip
from clip_jax.pretrained.work_folder import model_to_json, read_description
from clip_jax.sections import Config, all_values, bounds_of

GOLDEN = Path(__file__).parent / "golden" / "published"


def refused(function, *args) -> bool:
    """Return whether it was refused, which must take one line; any other error is the test's."""
    try:
        function(*args)
    except UserError as error:
        assert "\n" not in str(error)
        return True
    return False


def test_random_experiments():
    rng, values = random.Random(0), default()
    values.train.steps, values.data.train = 10, "x.tar"
    plain = values.to_dict()
    count = sum(
        refused(lambda: resolve(ml_collections.ConfigDict(mutated(plain, rng)))) for _ in range(400)
    )
    assert 200 < count < 400


def test_random_descriptions_of_models(tmp_path):
    rng = random.Random(1)
    names = ("ViT-B/32", "RN50", "convnext_base", "EVA02-B-16", "MobileCLIP-B")
    models = [model_to_json(MODELS[name]) for name in names]
    for number in range(200):
        values = {"model_name": "x", "model": models[number % len(models)], "config": {}}
        values |= {"tokenizer": {"kind": "clip"}, "preprocess": {}}
        (tmp_path / "config.json").write_text(json.dumps(mutated(values, rng)))
        refused(read_description, tmp_path)


@pytest.mark.parametrize(
    ("file", "part", "read"),
    [
        ("hf_clip/config.json", None, config_from_hf),
        ("hf_siglip/config.json", None, config_from_hf),
        ("open_clip/open_clip_config.json", "model_cfg", config_from_open_clip),
    ],
)
def test_random_published_configs(file, part, read):
    rng, values = random.Random(2), json.loads((GOLDEN / file).read_text())
    values = values[part] if part else values
    for _ in range(300):
        refused(read, mutated(values, rng), file)


def test_every_number_has_bounds():
    # The first is checked as a pair.
    numbers = {
        name
        for name, value in all_values(Config()).items()
        if name != "config.data.crop_scale"
        and any(type(item) in (int, float) for item in (value if type(value) is tuple else [value]))
    }
    assert numbers < bounds_of(Config()).keys()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ViTConfig(224, 0, 64, 2, 2), "vision.patch_size is 0; it takes a whole number, 1"),
        (lambda: ViTConfig(16, 32, 64, 2, 2), "vision.patch_size is 32, above vision.image_size"),
        (lambda: ViTConfig(224, 32, 64, 10**9, 2), "vision.layers is 1000000000; it takes a whole"),
        (lambda: ViTConfig(224, 32, 65, 2, 2), "vision.width is 65, not a multiple"),
        (lambda: TextConfig(64, 2, 0), "text.heads is 0"),
    ],
)
def test_sizes_that_no_model_has(make, message):
    with pytest.raises(UserError) as caught:
        make()
    assert message in str(caught.value)


def test_a_file_bounds_its_models_layers():
    config = CLIPConfig(64, ViTConfig(32, 8, 64, 1000, 2), TextConfig(64, 1000, 2))
    with pytest.raises(UserError, match="holds 300 arrays and its config has 2000 blocks"):
        check_layers(config, 300, "x.safetensors")
