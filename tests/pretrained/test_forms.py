"""Forms of published files beside the plain ones: shards, means of weights, Long-CLIP."""

import json

import numpy as np
import pytest
from reader_cases import GOLDEN, STATE, WRAPPED, read_parts, same, write_torch
from safetensors.numpy import save_file
from tiny import RESNET

from clip_jax.errors import UserError
from clip_jax.models.zoo import MODELS
from clip_jax.pretrained.infer import find_naming, model_of_arrays
from clip_jax.pretrained.layouts import export_arrays, file_shape
from clip_jax.pretrained.load import read_arrays, read_checkpoint
from clip_jax.pretrained.names import find_place
from clip_jax.pretrained.open_clip_config import config_from_open_clip, config_to_open_clip
from clip_jax.pretrained.open_clip_naming import config_naming
from clip_jax.pretrained.torch_file import read_torch, read_torch_shards
from clip_jax.pretrained.trees import array_shapes

PUBLISHED = GOLDEN / "published"


def write_index(folder, **changes):
    first, second = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    (folder / first).write_bytes((GOLDEN / "state_dict.pt").read_bytes())
    (folder / second).write_bytes((GOLDEN / "wrapper.pt").read_bytes())
    places = dict.fromkeys(STATE, first) | dict.fromkeys(WRAPPED, second)
    path = folder / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": places | changes}))
    return path


def test_shards_of_pickles_are_read_as_one(tmp_path):
    path = write_index(tmp_path)
    assert same(read_torch_shards(path), STATE | WRAPPED)
    with pytest.raises(UserError, match="some arrays twice"):  # but for `module.`
        read_arrays(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turned": "../x.bin"}, "no plain name"),
        ({"turned": "x.safetensors"}, "no plain name"),
        ({"more": "pytorch_model-00002-of-00002.bin"}, "more"),
    ],
)
def test_an_index_of_pickles_is_checked(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_torch_shards(write_index(tmp_path, **changes))


def test_the_mean_of_the_weights_goes_first(tmp_path):
    pickle, storages = read_parts(GOLDEN / "wrapper.pt")
    renamed = pickle.replace(b"X\x0a\0\0\0state_dict", b"X\x0e\0\0\0state_dict_ema")
    assert renamed != pickle
    assert same(read_torch(write_torch(tmp_path / "x.pt", renamed, storages)), WRAPPED)


def openai_arrays():
    """An OpenAI model's arrays without what gives it away."""
    arrays = dict(read_arrays(PUBLISHED / "openai" / "model.pt"))
    for name in ("input_resolution", "context_length", "vocab_size"):
        del arrays[name]
    return {name: np.asarray(x, np.float32, order="C") for name, x in arrays.items()}


def test_a_long_clip_has_248_positions_of_two_tables(tmp_path):
    arrays, rng = openai_arrays(), np.random.default_rng(0)
    width = arrays["positional_embedding"].shape[1]
    first, rest = rng.standard_normal((2, 248, width)).astype(np.float32)
    arrays |= {"positional_embedding": first, "positional_embedding_res": rest}
    save_file(arrays, tmp_path / "long.safetensors")
    checkpoint = read_checkpoint(tmp_path / "long.safetensors")
    assert checkpoint.config.text.context_length == 248
    assert checkpoint.config.vision.activation == "quick_gelu"
    merged = checkpoint.arrays["text/positional_embedding"]()
    np.testing.assert_array_equal(merged, np.concatenate([first[:20], rest[20:]]))
    save_file(arrays | {"positional_embedding_res": rest[:20]}, tmp_path / "long.safetensors")
    with pytest.raises(UserError, match="no Long-CLIP has"):
        read_checkpoint(tmp_path / "long.safetensors")


def test_a_resnets_name_stands_for_two_models(tmp_path):
    arrays = {path: np.zeros(shape, np.float32) for path, shape in array_shapes(RESNET).items()}
    save_file(export_arrays(arrays, "openai_resnet"), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="RN50 is RN50-quickgelu to OpenAI and RN50-gelu to"):
        read_checkpoint(tmp_path / "x.safetensors", "RN50")
    for name in ("RN50-gelu", "RN50:openai"):
        with pytest.raises(UserError, match="does not hold a RN50-"):
            read_checkpoint(tmp_path / "x.safetensors", name)


def test_a_captioner_is_left_out_in_a_line(tmp_path, capsys):
    folder = PUBLISHED / "open_clip"
    arrays = dict(read_arrays(folder / "open_clip_model.safetensors"))
    arrays = {name: np.array(x) for name, x in arrays.items()} | {"text_decoder.x": np.zeros(2)}
    save_file(arrays, tmp_path / "open_clip_model.safetensors")
    config = (folder / "open_clip_config.json").read_bytes()
    (tmp_path / "open_clip_config.json").write_bytes(config)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.arrays.keys() == read_checkpoint(folder).arrays.keys()
    assert "the 1 arrays of its captioner, which" in capsys.readouterr().err


def test_a_file_of_a_tower_of_timm_is_known_by_its_shapes():
    config, zero = MODELS["EVA02-B-16"], np.zeros((), np.float32)
    naming, shapes = config_naming(config), array_shapes(config)
    arrays = {}
    for path, shape in shapes.items():
        place = find_place(path, naming)
        arrays[place.key] = np.broadcast_to(zero, file_shape(shape, place))
    assert find_naming(arrays, "x") == naming
    assert model_of_arrays(arrays, naming, "x") == "EVA02-B-16"
    del arrays["visual.trunk.norm.bias"]
    with pytest.raises(UserError, match="no registered model has these arrays"):
        model_of_arrays(arrays, naming, "x")


def test_open_visions_config_is_read():
    """The config of its tiny model at 160 pixels, as its folder has it."""
    norm = {"norm_kwargs": {"eps": 1e-6}}
    vision = {"image_size": 160, "layers": 12, "width": 192, "patch_size": 16, "head_width": 64}
    vision |= {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True} | norm
    text = {"context_length": 80, "vocab_size": 32000, "hf_tokenizer_name": "bert-base-uncased"}
    text |= {"tokenizer_kwargs": {"strip_sep_token": True}, "width": 192, "heads": 3, "layers": 12}
    text |= {"pool_type": "last", "no_causal_mask": True} | norm
    text["act_kwargs"] = {"approximate": "tanh"}
    config = config_from_open_clip(
        {"embed_dim": 192, "vision_cfg": vision, "text_cfg": text}, "OpenVision"
    )
    assert (config.vision.activation, config.text.activation) == ("gelu", "gelu_tanh")
    assert config.vision.norm_eps == config.text.norm_eps == 1e-6
    assert config_from_open_clip(config_to_open_clip(config), "OpenVision") == config
