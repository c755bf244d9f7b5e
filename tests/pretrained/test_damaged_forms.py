"""Every published form with something wrong in it: the model, or one line; never another error.

The bytes of single files are damaged in test_readers. Here it is what they hold: names, shapes and
types of arrays, an index, a config, a processor's settings.
"""

import copy
import dataclasses
import itertools
import json
import os
import pickle
import struct

import numpy as np
import pytest
from naflex_folder import CONFIG, PROCESSOR, write_naflex
from reader_cases import write_torch
from safetensors.numpy import load_file, save_file
from tiny import RESNET, SIGLIP, TEXT, VIT

from clip_jax.errors import UserError
from clip_jax.models import zoo
from clip_jax.models.block_form import BlockForm
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.convnext import ConvNeXtConfig
from clip_jax.models.fastvit import FastViTConfig
from clip_jax.models.rotary import RotaryConfig
from clip_jax.models.text import EncoderForm
from clip_jax.models.vit import ViTConfig
from clip_jax.pretrained.layouts import export_arrays
from clip_jax.pretrained.load import read_checkpoint
from clip_jax.pretrained.names import find_place
from clip_jax.pretrained.open_clip_naming import config_naming
from clip_jax.pretrained.trees import array_shapes

_PE = BlockForm(rotary=RotaryConfig(4, 1.0, "columns first"))
_EVA01 = BlockForm(key_bias=False)
_EVA02 = dataclasses.replace(_PE, mlp="swiglu", inner_norms=True, key_bias=False)
_VIT = ViTConfig(16, 4, 32, 1, 4, mlp_ratio=2.0, activation="gelu", proj_bias=True)
_ENCODER = dataclasses.replace(TEXT, layers=1, causal=False, eot_id=2, activation="gelu")
_ROBERTA = EncoderForm(norms="after", positions=40, pool="mean", projection="mlp")
_NLLB = EncoderForm(norms="before", positions=0, pool="first", projection="linear")


def tower(vision, text=None):
    return CLIPConfig(16, vision, text or dataclasses.replace(TEXT, layers=1))


FAMILIES = {
    "ResNet": RESNET,
    "SigLIP": dataclasses.replace(
        SIGLIP, vision=dataclasses.replace(SIGLIP.vision, layer_scale=None)
    ),
    "PE": tower(dataclasses.replace(_VIT, pool="map", pool_heads=4, form=_PE)),
    "EVA-01": tower(dataclasses.replace(_VIT, form=_EVA01, pre_norm=False)),
    "EVA-02": tower(dataclasses.replace(_VIT, form=_EVA02, pre_norm=False)),
    "ConvNeXt": tower(ConvNeXtConfig(32, (1, 1), (8, 16))),
    "MobileCLIP": tower(FastViTConfig(64, (1, 1, 1, 1), (8, 16, 16, 32))),
    "CoCa": tower(
        dataclasses.replace(_VIT, proj_bias=False, pool="queries", pool_queries=3),
        dataclasses.replace(TEXT, layers=1, class_token=True),
    ),
    "RoBERTa": tower(VIT.vision, dataclasses.replace(_ENCODER, encoder=_ROBERTA)),
    "NLLB": tower(VIT.vision, dataclasses.replace(_ENCODER, activation="relu", encoder=_NLLB)),
}
TYPES = {"float32": "Float", "float16": "Half", "int64": "Long", "bool": "Bool"}


def numbers(config):
    rng = np.random.default_rng(0)
    shapes = array_shapes(config)
    return {name: rng.normal(0, 0.1, s).astype(np.float32) for name, s in shapes.items()}


def torch_program(arrays):
    """Return the pickle of a dict of tensors and their storages, as `torch.save` writes them."""

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def whole(values):
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    program, storages = b"}(", []
    for number, (name, x) in enumerate(arrays.items()):
        x = np.asarray(x, order="C")
        kind = TYPES.get(x.dtype.name, "Float")
        x = x.astype({v: k for k, v in TYPES.items()}[kind])
        steps = [int(np.prod(x.shape[i + 1 :])) for i in range(x.ndim)]
        program += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage")
        program += f"ctorch\n{kind}Storage\n".encode() + text(str(number)) + text("cpu")
        program += b"J" + struct.pack("<i", x.size) + b"tQK\0" + whole(x.shape) + whole(steps)
        program += b"\x89ccollections\nOrderedDict\n)RtR"
        storages.append((str(number), x.tobytes()))
    return program + b"u", storages


def write_pickle(path, arrays, key=None):
    program, storages = torch_program(arrays)
    if key is not None:
        program = b"}X" + struct.pack("<I", len(key)) + key.encode() + program + b"s"
    return write_torch(path, b"\x80\x02" + program + b".", storages)


def write_shards(folder, arrays, ending="bin"):
    """Write Hugging Face's weights in two files behind an index."""
    stem = "pytorch_model" if ending == "bin" else "model"
    names, places = list(arrays), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"{stem}-0000{number}-of-00002.{ending}"
        held = {name: np.ascontiguousarray(arrays[name]) for name in part}
        if ending == "bin":
            write_pickle(folder / shard, held)
        else:
            save_file(held, folder / shard)
        places |= dict.fromkeys(part, shard)
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"weight_map": places}))


# Each writes the arrays in its form; the model is what `read_checkpoint` is given.
def hf_form(write):
    def form(folder, arrays):
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        write(folder, arrays)
        return folder, None

    return form


def bare_form(write, name):
    def form(folder, arrays):
        write(folder / name, arrays)
        return folder / name, "tiny"

    return form


def write_whole(folder, arrays):
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, folder / "model.safetensors")


def write_plain(path, arrays):
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path)


def compiled(path, arrays):
    write_plain(path, {f"_orig_mod.{name}": x for name, x in arrays.items()})


FOLDERS = {
    "NaFlex folder": hf_form(write_whole),
    "safetensors index": hf_form(lambda folder, x: write_shards(folder, x, "safetensors")),
    "sharded .bin": hf_form(write_shards),
}
FILES = {
    "state_dict_ema": bare_form(lambda p, x: write_pickle(p, x, "state_dict_ema"), "x.pt"),
    "_orig_mod.": bare_form(compiled, "x.safetensors"),
}
BARE = bare_form(write_plain, "x.safetensors")
CASES = {
    **{name: (form, None) for name, form in FOLDERS.items()},
    **{name: (form, VIT) for name, form in FILES.items()},
    **{name: (BARE, config) for name, config in FAMILIES.items()},
}


def case_arrays(config, folder):
    """Return a form's arrays by the file's names."""
    if config is None:
        return dict(load_file(write_naflex(folder / "naflex") / "model.safetensors"))
    return export_arrays(numbers(config), config_naming(config))


def another(rng, arrays):
    return str(rng.choice(list(arrays)))


def lost(rng, arrays):
    del arrays[another(rng, arrays)]


def renamed(rng, arrays):
    name = another(rng, arrays)
    how = ["{}.x", "x.{}", "module.{}", "visual.trunk.{}", "text.{}"]
    arrays[str(rng.choice(how)).format(name)] = arrays.pop(name)


def added(rng, arrays):
    names = [
        *("visual.trunk.stem.0.conv_kxk.0.conv.weight", "positional_embedding_res"),
        *("visual.trunk.patch_embed.backbone.0.bn.weight", "visual.trunk.head.weight"),
        *("visual.head.mlp.fc1.weight", "text.cls_emb", "visual.trunk.blocks.0.attn.q_bias"),
        *("vision_model.head.probe", "logit_bias", "text_decoder.x", "input_resolution"),
        *("params/img/embedding/kernel", "a.logit_scale", "b.logit_scale"),
    ]
    arrays[str(rng.choice(names))] = np.ones((2,) * int(rng.integers(5)), np.float32)


def reshaped(rng, arrays):
    name = another(rng, arrays)
    x = arrays[name]
    shapes = [(), (0,), (1, *x.shape), x.shape[::-1], (x.size,), (*x.shape, 2), (1,), (3, 5)]
    arrays[name] = np.resize(x, shapes[rng.integers(len(shapes))])


def retyped(rng, arrays):
    name = another(rng, arrays)
    arrays[name] = arrays[name].astype(rng.choice(["float16", "int64", "bool"]))


def swapped(rng, arrays):
    one, two = another(rng, arrays), another(rng, arrays)
    arrays[one], arrays[two] = arrays[two], arrays[one]


DAMAGES = (lost, renamed, added, reshaped, retyped, swapped)


def outcome(path, model):
    """Return the arrays that are read, or None where it is refused in one line."""
    try:
        checkpoint = read_checkpoint(path, model)
        arrays = {name: read() for name, read in checkpoint.arrays.items()}
    except UserError as error:
        line = str(error)
        assert "\n" not in line and len(line) < 900, line
        return None
    shapes = array_shapes(checkpoint.config)
    assert {name: x.shape for name, x in arrays.items()} == shapes
    assert all(x.dtype == np.float32 for x in arrays.values())
    return arrays


def check_arrays(name, folder, monkeypatch, rounds):
    form, config = CASES[name]
    if config is not None:
        monkeypatch.setitem(zoo.MODELS, "tiny", config)
    sound = case_arrays(config, folder)
    read = outcome(*form(folder, sound))
    assert read is not None
    if config is not None:
        expected = numbers(config)
        assert all(np.array_equal(read[key], x) for key, x in expected.items())
    rng = np.random.default_rng([rounds, [*CASES].index(name)])
    refusals = 0
    for _, damage in zip(range(rounds), itertools.cycle(DAMAGES), strict=False):
        arrays = dict(sound)
        for _ in range(int(rng.integers(1, 3))):
            damage(rng, arrays)
        refusals += outcome(*form(folder, arrays)) is None
    assert refusals >= rounds // 4


@pytest.mark.parametrize("name", CASES)
def test_arrays_that_are_not_the_models_end_in_one_line(name, tmp_path, monkeypatch):
    check_arrays(name, tmp_path, monkeypatch, 36)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_many_of_them_do(name, tmp_path, monkeypatch):
    check_arrays(name, tmp_path, monkeypatch, 400)


BRANCHES = ("conv_kxk.0", "conv_scale", "identity")


def branched_arrays():
    """Return a MobileCLIP whose stem has the branches and batch norms that it was trained with."""
    config = FAMILIES["MobileCLIP"]
    arrays = export_arrays(numbers(config), config_naming(config))
    rng = np.random.default_rng(1)
    names = [find_place(f"visual/stem_{i}/kernel", config_naming(config)).key for i in range(2)]
    for name in names:
        kernel = arrays.pop(name)
        del arrays[name.removesuffix("weight") + "bias"]
        group, width = name.removesuffix(".reparam_conv.weight"), len(kernel)
        for branch in BRANCHES[:2] if kernel.shape[1] == 1 else BRANCHES[:1]:
            small = kernel[..., 1:2, 1:2] if branch == "conv_scale" else kernel
            arrays[f"{group}.{branch}.conv.weight"] = small
            for part in ("weight", "bias", "running_mean", "running_var"):
                arrays[f"{group}.{branch}.bn.{part}"] = rng.random(width).astype(np.float32)
    return arrays


def test_branches_that_do_not_fit_end_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(zoo.MODELS, "tiny", FAMILIES["MobileCLIP"])
    sound = branched_arrays()
    assert outcome(*BARE(tmp_path, sound)) is not None
    stem = [name for name in sound if ".stem." in name]
    rng = np.random.default_rng(0)
    refusals = 0
    for damage in (lost, reshaped, renamed, retyped) * 10:
        arrays = {name: sound[name] for name in stem}
        damage(rng, arrays)
        rest = {name: x for name, x in sound.items() if name not in stem}
        refusals += outcome(*BARE(tmp_path, rest | arrays)) is None
    assert refusals >= 15


ODD = (None, "x", -1, 0, 1.5, [], {}, True, 10**12, "\0", [1, 2])


def test_configs_that_make_no_sense_end_in_one_line(tmp_path):
    folder = write_naflex(tmp_path)
    arrays = load_file(folder / "model.safetensors")
    weights = (folder / "model.safetensors").read_bytes()
    rng = np.random.default_rng(0)
    refusals = 0
    for path, values in (("config.json", CONFIG), ("preprocessor_config.json", PROCESSOR)):
        places = [(key,) for key in values]
        places += [(k, inner) for k, v in values.items() if isinstance(v, dict) for inner in v]
        for place, odd in itertools.product(places, ODD):
            if rng.random() < 0.5:
                continue
            changed = copy.deepcopy(values)
            *outer, last = place
            (changed[outer[0]] if outer else changed)[last] = odd
            (folder / path).write_text(json.dumps(changed))
            refusals += outcome(folder, None) is None
        (folder / path).write_text(json.dumps(values))
    assert refusals > 40
    assert weights == (folder / "model.safetensors").read_bytes()
    assert len(outcome(folder, None)) == len(array_shapes(read_checkpoint(folder).config))
    assert arrays


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_an_index_with_damaged_bytes_ends_in_one_line(tmp_path, ending):
    arrays = case_arrays(None, tmp_path)
    folder, _ = hf_form(lambda f, x: write_shards(f, x, ending))(tmp_path, arrays)
    (path,) = folder.glob("*.index.json")
    sound, rng = path.read_bytes(), np.random.default_rng(0)
    for i in range(60):
        at = int(rng.integers(len(sound)))
        changed = sound[:at] if i % 3 == 0 else bytearray(sound)
        if i % 3:
            changed[at] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(changed))
        outcome(folder, None)
    path.write_bytes(sound)
    assert outcome(folder, None) is not None


class Runs:
    """A class whose pickle runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_no_form_runs_the_code_of_a_pickle(tmp_path):
    marker = tmp_path / "ran"
    hostile = pickle.dumps({"state_dict_ema": {"w": Runs(f"touch {marker}")}}, 2)
    arrays = case_arrays(None, tmp_path)
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        hf_form(write_shards)(folder, arrays)
        write_torch(folder / f"pytorch_model-0000{number}-of-00002.bin", hostile)
        assert outcome(folder, None) is None
    for name in ("x.pt", "x.bin", "x.ckpt", "open_clip_pytorch_model.bin"):
        path = write_torch(tmp_path / name, hostile)
        with pytest.raises(UserError, match=r"system.*nothing in it was run"):
            read_checkpoint(path, "ViT-B-32-quickgelu")
    assert not marker.exists()
