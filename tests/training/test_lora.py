"""Adapters: drawn, trained beside a model that stays as it is, merged, saved and given to PEFT."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from model_cases import random_variables
from safetensors.numpy import load_file
from steps import make_all, make_batch, one_device_mesh
from tiny import RESNET, SIGLIP, VIT

from clip_jax.errors import UserError
from clip_jax.models.clip import CLIP, variable_shapes
from clip_jax.models.lora import LORA, TARGETS, make_adapters, merge_adapters, target_paths
from clip_jax.models.stack import stack_layers, unstack_layers
from clip_jax.parallel.mesh import place_batch
from clip_jax.pretrained import work_folder
from clip_jax.pretrained.peft import read_peft, write_peft
from clip_jax.tools.convert import convert, convert_to
from clip_jax.training import adapters as run_adapters
from clip_jax.training.adapters import read_run_adapters
from clip_jax.training.checkpoint import Checkpoints
from clip_jax.typing import leaves_by_path

ALL = tuple(TARGETS)
SMALL = dataclasses.replace(
    VIT,
    vision=dataclasses.replace(VIT.vision, image_size=16, layers=2),
    text=dataclasses.replace(VIT.text, layers=2),
)


def with_random_adapters(params, seed=1):
    adapters = make_adapters(params, rank=3, targets=ALL, seed=seed)
    rng = np.random.default_rng(seed)
    return params | {
        LORA: jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), adapters)
    }


def test_every_matrix_of_the_blocks_has_a_word():
    paths = target_paths(variable_shapes(CLIP(SMALL))["params"], ALL)
    kernels = set(leaves_by_path(variable_shapes(CLIP(SMALL))["params"]))
    assert set(paths) == {n for n in kernels if n.endswith("kernel") and "resblocks" in n} | {
        "visual/conv1/kernel",
        "visual/proj",
        "text/text_projection",
    }
    with pytest.raises(UserError, match="no such matrix"):
        target_paths(variable_shapes(CLIP(SMALL))["params"], ("nowhere",))
    with pytest.raises(UserError, match="no matrix that can have"):
        make_adapters(random_variables(RESNET)["params"], rank=2, targets=("bn1/scale",), seed=0)


def test_a_fresh_adapter_changes_nothing_and_a_stack_draws_as_its_blocks():
    params = random_variables(VIT)["params"]
    adapters = make_adapters(params, rank=2, targets=ALL, seed=5)
    chex.assert_trees_all_equal(merge_adapters(params | {LORA: adapters}, 2.0), params)
    convolutions = make_adapters(random_variables(RESNET)["params"], rank=2, targets=ALL, seed=5)
    assert convolutions["visual"]["conv2"]["kernel"]["lora_a"].shape == (3 * 3 * 4, 2)
    stacked = make_adapters(stack_layers(params), rank=2, targets=ALL, seed=5)
    chex.assert_trees_all_equal(unstack_layers(stacked), adapters)
    other = make_adapters(params, rank=2, targets=ALL, seed=6)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), adapters, other)
    assert not all(jax.tree.leaves(same))


def test_a_merged_kernel_is_the_kernel_and_its_adapter():
    params = with_random_adapters(random_variables(VIT)["params"])
    merged, leaves = leaves_by_path(merge_adapters(params, 0.5)), leaves_by_path(params)
    rng = np.random.default_rng(0)
    for path, inputs in (
        ("visual/transformer/resblocks_0/attn/q_proj/kernel", 1),
        ("text/transformer/resblocks_1/attn/out_proj/kernel", 2),
        ("text/text_projection", 1),
    ):
        kernel = np.asarray(leaves[path], np.float64)
        matrix = kernel.reshape(int(np.prod(kernel.shape[:inputs])), -1)
        x = rng.normal(size=(4, len(matrix)))
        a, b = (np.asarray(leaves[f"{LORA}/{path}/lora_{c}"], np.float64) for c in "ab")
        want = x @ matrix + 0.5 * (x @ a) @ b
        got = x @ np.asarray(merged[path], np.float64).reshape(matrix.shape)
        # One rounding of each number of the kernel to float32.
        np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())
    stacked = merge_adapters(stack_layers(params), 0.5)
    chex.assert_trees_all_close(unstack_layers(stacked), merge_adapters(params, 0.5), atol=1e-6)


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_adapters_learn_and_the_towers_keep_their_bits(tmp_path, scan):
    fields = {"lora_rank": 2, "lora_alpha": 4.0, "lora_targets": ("q", "fc")}
    state, step = make_all(SMALL, one_device_mesh(), scan=scan, **fields)
    before = jax.device_get(state)
    for i in range(2):
        state, _ = step(state, place_batch(make_batch(SMALL, i), one_device_mesh()))
    after = jax.device_get(state)
    for tower in ("visual", "text"):
        chex.assert_trees_all_equal(before.params[tower], after.params[tower])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.params[LORA], after.params[LORA])
    assert any(jax.tree.leaves(moved))
    (adam,) = [s for s in state.opt_state if hasattr(s, "mu")]
    assert set(adam.mu) == {LORA, "logit_scale"}
    # A run is loaded with its adapters merged, blocks one by one, and they can be had alone.
    saver = Checkpoints(tmp_path)
    saver.save(state, 2, {f"config.train.{key}": value for key, value in fields.items()})
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        {"params": variable_shapes(CLIP(SMALL))["params"], "batch_stats": {}},
    )
    restored, _ = saver.restore_model(shapes)
    saver.close()
    merged = unstack_layers(merge_adapters(state.params, 2.0))
    chex.assert_trees_all_close(restored["params"], merged, atol=1e-7)
    leaves, alpha = read_run_adapters(tmp_path, SMALL)
    assert alpha == 4 and set(leaves) == set(leaves_by_path(unstack_layers(after.params[LORA])))


@pytest.mark.parametrize("config", [VIT, SIGLIP], ids=["clip", "siglip"])
def test_pefts_files_go_both_ways(tmp_path, config):
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, mlp_ratio=4.0))
    params = random_variables(config)["params"]
    targets = ("q", "v", "out", r"transformer/.*/c_proj/kernel$")
    adapters = make_adapters(params, rank=3, targets=targets, seed=0)
    leaves = {
        k: np.asarray(x) + 1 for k, x in leaves_by_path(adapters).items() if "attn_pool" not in k
    }
    write_peft(tmp_path, leaves, config, alpha=6.0, base="")
    names = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    assert names[key].shape == (3, 48)
    found = read_peft(tmp_path, config)
    assert set(found.scales.values()) == {2.0}
    for path, (first, second) in found.pairs.items():
        np.testing.assert_array_equal(first, leaves[f"{path}/lora_a"])
        np.testing.assert_array_equal(second, leaves[f"{path}/lora_b"])
    assert 2 * len(found.pairs) == len(leaves)


def test_options_that_adapters_do_not_take_are_refused(tmp_path):
    with pytest.raises(UserError, match="it takes no --architecture, --tokenizer, --image-size"):
        convert("runs/x", str(tmp_path / "adapters"), to="peft", image_size=64)


def test_adapters_for_the_hub_have_a_card(tmp_path, monkeypatch):
    path = "text/transformer/resblocks_0/mlp/c_fc/kernel/lora_"
    leaves = {f"{path}a": np.ones((32, 2)), f"{path}b": np.ones((2, 128))}
    description = work_folder.RunDescription(
        "tiny", VIT, None, config={"model": {"init_from": "hf-hub:a/b"}}
    )
    monkeypatch.setattr(work_folder, "read_description", lambda src: description)
    monkeypatch.setattr(run_adapters, "read_run_adapters", lambda src, sizes: (leaves, 2.0))
    convert_to("run", tmp_path / "out", to="peft", card_of="me/mine")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card and 'snapshot_download("me/mine")' in card
    assert 'clip_jax.load("hf-hub:a/b", adapters=folder)' in card and "Measured" not in card


def test_pefts_files_of_another_kind_are_refused(tmp_path):
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    leaves = {
        f"text/transformer/resblocks_0/mlp/c_fc/kernel/lora_{c}": np.ones(shape, np.float32)
        for c, shape in (("a", (32, 2)), ("b", (2, 128)))
    }
    write_peft(tmp_path, leaves, VIT, alpha=2.0, base="")
    for changes, message in (
        ({"peft_type": "IA3"}, "not LORA"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(values | changes))
        with pytest.raises(UserError, match=message):
            read_peft(tmp_path, VIT)
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    wide = dataclasses.replace(VIT, text=dataclasses.replace(VIT.text, width=64))
    with pytest.raises(UserError, match="and the model's text/"):
        read_peft(tmp_path, wide)
