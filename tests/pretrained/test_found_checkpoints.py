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
from clip_jax.tokenizers.folder import write_clip_tokenizer

SIGMOID = dataclasses.replace(VIT, init_logit_bias=-10.0)


def description(config):
    return RunDescription("tiny", config, None)


def arrays_of(config):
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in array_shapes(config).items()
    }


def write_clip_bpe(folder):
    """Write the vocabulary of CLIP's own tokenizer."""
    config = (folder / "tokenizer_config.json").read_text()
    write_clip_tokenizer(folder, 77)
    (folder / "tokenizer_config.json").write_text(config)


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


def edit(path, **values):
    """Change fields of a JSON file; one of a section is named `section__field`."""
    content = json.loads(path.read_text())
    for name, value in values.items():
        section, inner, field = name.partition("__")
        (content.setdefault(section, {}) if inner else content)[field or section] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        {"norm_everywhere": True},
        {"init_logit_shift": 3},
        {"vision_cfg__qk_norm": True},
        {"vision_cfg__act_kwargs": {"approximate": "tanh", "inplace": True}},
        {"text_cfg__norm_kwargs": {"eps": 1e-6, "bias": "no"}},
        {"text_cfg__tokenizer_mode": "clips"},
        {"text_cfg__tokenizer_kwargs": {"language": "fra_Latn"}},
        {"text_cfg__ls_init_value": 1e-4},
    ],
)
def test_a_setting_of_open_clip_that_no_module_has_is_refused(sigmoid_files, change):
    folder = sigmoid_files[0] / "open_clip"
    path = folder / "open_clip_config.json"
    content = json.loads(path.read_text())
    ((name, value),) = change.items()
    section, _, field = name.rpartition("__")
    (content["model_cfg"][section] if section else content["model_cfg"])[field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="which is not supported"):
        read_checkpoint(folder)


def test_settings_of_a_config_without_effect_say_nothing_and_others_are_named(
    sigmoid_files, capsys
):
    folder = sigmoid_files[0] / "hf"
    path = folder / "config.json"
    read_checkpoint(folder)
    edit(
        path, transformers_version="5.0", text_config__num_beams=4, text_config__pad_token_id=1,
        vision_config__image_size=[VIT.vision.image_size] * 2, text_config__min_length=2,
        vision_config__num_channels=3, text_config___name_or_path="x", text_config__rotary=False,
    )  # fmt: skip
    capsys.readouterr()
    edit(path, text_config__eos_token_id=[VIT.text.eot_id])
    assert read_checkpoint(folder).config.vision.image_size == VIT.vision.image_size
    assert capsys.readouterr().err == ""
    edit(
        path, rotary_base=1e4, vision_config__use_registers=4, text_config__pruned_heads={"0": [1]}
    )
    read_checkpoint(folder)
    error = capsys.readouterr().err
    for name in ("rotary_base = 10000.0", "use_registers = 4", "pruned_heads = {'0': [1]}"):
        assert name in error
    edit(path, vision_config__num_channels=4)
    with pytest.raises(UserError, match="num_channels is 4, which is not supported"):
        read_checkpoint(folder)
    edit(path, vision_config__num_channels=3, vision_config__image_size=[224, 112])
    with pytest.raises(UserError, match="is not one number"):
        read_checkpoint(folder)


def test_settings_of_other_files_that_are_not_known_are_named(sigmoid_files, capsys):
    folder = sigmoid_files[0] / "hf"
    processor = {"image_processor_type": "CLIPImageProcessor", **HALF}
    values = {"image_processor": processor, "video_processor": {"fps": 2}}
    (folder / "processor_config.json").write_text(json.dumps(values))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"do_lower_case": False, "model_max_length": 77, "sp_model_kwargs": {"a": 1}})
    )
    write_clip_bpe(folder)
    read_checkpoint(folder)
    error = capsys.readouterr().err
    for text in ("video_processor = {'fps': 2}", "do_lower_case is False", "sp_model_kwargs = "):
        assert text in error
    assert "model_max_length" not in error
    edit(sigmoid_files[0] / "open_clip/open_clip_config.json", image_processor="another")
    read_checkpoint(sigmoid_files[0] / "open_clip")
    assert "image_processor = 'another'" in capsys.readouterr().err


def test_a_folder_of_sentence_transformers_is_read(sigmoid_files):
    folder, bias = sigmoid_files
    outer = folder / "outer"
    outer.mkdir()
    (folder / "hf").rename(outer / "0_CLIPModel")
    with pytest.raises(UserError, match="holds no checkpoint"):
        read_checkpoint(outer)
    (outer / "modules.json").write_text("[]")
    assert bias_of(read_checkpoint(outer)) == bias


def test_files_that_hold_no_weights_say_what_they_are(sigmoid_files):
    folder, _ = sigmoid_files
    name = "base_model.model.visual.proj.lora_A.weight"
    save_file({name: np.zeros((2, 2), np.float32)}, folder / "adapter.safetensors")
    (folder / "page.bin").write_text("<!DOCTYPE html><html>Sign in</html>")
    (folder / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "hf/model.safetensors").unlink()
    (folder / "hf/flax_model.msgpack").write_bytes(b"x")
    for path, message in (
        ("adapter.safetensors", r"LoRA's changes to a model.*merge_and_unload"),
        ("page.bin", "is a web page and holds no data"),
        ("pointer.pt", "is a pointer of Git LFS"),
        ("hf", r"no weights.*flax_model.msgpack cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            read_checkpoint(folder / path, "tiny")


def test_a_default_that_is_taken_for_a_file_is_told(sigmoid_files, capsys):
    folder, _ = sigmoid_files
    edit(folder / "hf/preprocessor_config.json", size={"shortest_edge": 64}, crop_size=64)
    read_checkpoint(folder / "hf")
    edit(folder / "open_clip/open_clip_config.json", preprocess_cfg__size=[64, 64])
    read_checkpoint(folder / "open_clip")
    error = capsys.readouterr().err
    assert "images of {'shortest_edge': 64} pixels; the model's 32 are taken" in error
    assert "images of [64, 64] pixels; the model's 32 are taken" in error
    (folder / "hf/preprocessor_config.json").unlink()
    read_checkpoint(folder / "hf")
    assert "its images are prepared as those of OpenAI" in capsys.readouterr().err
