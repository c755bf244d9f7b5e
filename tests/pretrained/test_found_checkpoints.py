"""Checkpoints as people have them: wrapped, with a bias, beside the files of newer libraries."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import VIT

from clip_jax.data.images import OPENAI, Preprocess
from clip_jax.errors import UserError
from clip_jax.models import zoo
from clip_jax.pretrained import torch_file
from clip_jax.pretrained.export import write_hf, write_open_clip
from clip_jax.pretrained.load import read_checkpoint
from clip_jax.pretrained.preprocess import preprocess_from_hf, preprocess_from_open_clip
from clip_jax.pretrained.trees import array_shapes
from clip_jax.pretrained.work_folder import RunDescription

SIGMOID = dataclasses.replace(VIT, init_logit_bias=-10.0)


def description(config):
    return RunDescription("tiny", config, None)


def arrays_of(config):
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in array_shapes(config).items()
    }


def bias_of(checkpoint):
    return next(float(read()) for name, read in checkpoint.arrays.items() if "logit_bias" in name)


@pytest.fixture
def sigmoid_files(tmp_path, monkeypatch):
    """Return the sigmoid model as open_clip's folder and as Hugging Face's, and its bias."""
    monkeypatch.setitem(zoo.MODELS, "tiny", VIT)
    arrays = arrays_of(SIGMOID)
    for name, write in (("open_clip", write_open_clip), ("hf", write_hf)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, description(SIGMOID), arrays)
    return tmp_path, next(float(x) for name, x in arrays.items() if "logit_bias" in name)


def test_what_a_sigmoid_run_exports_is_read_again(sigmoid_files):
    folder, bias = sigmoid_files
    for name in ("open_clip", "hf"):
        checkpoint = read_checkpoint(folder / name)
        assert checkpoint.config.init_logit_bias == -10.0
        assert bias_of(checkpoint) == bias
    config = json.loads((folder / "open_clip/open_clip_config.json").read_text())
    assert config["model_cfg"]["init_logit_bias"] == -10


def test_a_bias_that_the_config_does_not_name_is_taken(sigmoid_files):
    folder, bias = sigmoid_files
    path = folder / "open_clip/open_clip_config.json"
    values = json.loads(path.read_text())
    del values["model_cfg"]["init_logit_bias"]
    path.write_text(json.dumps(values))
    assert bias_of(read_checkpoint(folder / "open_clip")) == bias
    weights = folder / "open_clip/open_clip_model.safetensors"
    checkpoint = read_checkpoint(weights, "tiny")
    assert bias_of(checkpoint) == bias and checkpoint.config.init_logit_bias == -10.0
    without = {name: x for name, x in load_file(weights).items() if name != "logit_bias"}
    save_file(without, folder / "without.safetensors")
    assert read_checkpoint(folder / "without.safetensors", "tiny").config.init_logit_bias is None


@pytest.mark.parametrize("prefix", ["model.", "clip.", "student.clip_model.", "module.model."])
def test_the_model_inside_another_module_is_read(sigmoid_files, prefix, capsys):
    folder, bias = sigmoid_files
    arrays = load_file(folder / "open_clip/open_clip_model.safetensors")
    wrapped = {prefix + name: x for name, x in arrays.items()} | {"loss.weight": np.zeros(3)}
    path = folder / f"{prefix}safetensors"
    save_file(wrapped, path)
    assert bias_of(read_checkpoint(path, "tiny")) == bias
    assert "1 arrays beside those of the model" in capsys.readouterr().err


def test_two_models_in_one_file_are_refused(sigmoid_files):
    folder, _ = sigmoid_files
    arrays = load_file(folder / "open_clip/open_clip_model.safetensors")
    two = {f"{prefix}.{name}": x for prefix in ("teacher", "student") for name, x in arrays.items()}
    save_file(two, folder / "two.safetensors")
    with pytest.raises(UserError, match=r"several models.*student\..*save one alone"):
        read_checkpoint(folder / "two.safetensors", "tiny")


TENSOR = torch_file.Tensor(torch_file.Storage("0", "float32", 1), 0, (1,), (1,))


@pytest.mark.parametrize(
    "root",
    [
        {"model_state_dict": {"a": TENSOR}, "epoch": 3},
        {"model": {"a": TENSOR}},
        {"epoch": 3, "state_dict_ema": {"a": TENSOR}},
        {"net": {"a": TENSOR}, "optimizer": {"state": {}}},
        {"weights": {"a": TENSOR}, "args": {"lr": 1.0}},
        {"model_state": {"a": TENSOR}, "scheduler": {}},
    ],
)
def test_a_state_dict_is_found_under_any_key(root):
    assert torch_file._find_tensors(root) == {"a": TENSOR}


def test_two_dicts_of_tensors_are_named():
    with pytest.raises(torch_file.BadFileError, match="first, second"):
        torch_file._find_tensors({"first": {"a": TENSOR}, "second": {"a": TENSOR}})


HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
SETTINGS = Preprocess(interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)


def test_the_processor_file_of_newer_transformers_is_read(sigmoid_files):
    folder = sigmoid_files[0] / "hf"
    (folder / "preprocessor_config.json").unlink()
    assert read_checkpoint(folder).preprocess == OPENAI
    processor = {"image_processor_type": "CLIPImageProcessor", **HALF}
    values = {"image_processor": processor, "processor_class": "CLIPProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(values))
    assert read_checkpoint(folder).preprocess == SETTINGS
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    assert read_checkpoint(folder).preprocess == SETTINGS


def test_settings_that_are_not_known_are_told(capsys):
    assert preprocess_from_hf(HALF | {"do_pad": True, "pad_size": None}, where="x") == SETTINGS
    assert (
        "x: settings that are not known are passed over: do_pad = True" in capsys.readouterr().err
    )
    preprocess_from_open_clip({"crop_pct": 0.9, "mean": [0.5] * 3})
    assert "crop_pct = 0.9" in capsys.readouterr().err
    preprocess_from_hf({"do_convert_rgb": True, "crop_size": 224})
    assert capsys.readouterr().err == ""
