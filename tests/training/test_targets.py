"""A process lowers the step for devices that it does not have, each with its own kernels."""

import dataclasses
import re

import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from steps import make_parts, one_device_mesh
from tiny import VIT

from clip_jax.models.clip import CLIP
from clip_jax.models.target import Target
from clip_jax.parallel.mesh import device_target, make_mesh, mesh_target
from clip_jax.planning.program import batch_shapes
from clip_jax.sections import OptimSection, TrainSection
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.state import make_init, state_shapes
from clip_jax.training.step import (
    ASYNC_GATHERS,
    COLLECTIVES_ON_SPARSE_CORES,
    GATHERS_IN_PRODUCTS,
    compiler_options,
)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a device of a topology says about itself."""

    platform: str
    device_kind: str
    compute_capability: str = ""


@pytest.mark.parametrize(
    ("device", "target"),
    [
        (Device("tpu", "TPU v5 lite"), Target("tpu", "v5e")),
        (Device("tpu", "TPU v5"), Target("tpu", "v5p")),
        (Device("tpu", "TPU v6 lite"), Target("tpu", "v6e")),
        (Device("tpu", "TPU v4"), Target("tpu", "v4")),
        (Device("gpu", "NVIDIA H100", "9.0"), Target("cuda", "NVIDIA H100", (9, 0))),
        (Device("gpu", "AMD MI300X", "gfx942"), Target("rocm", "AMD MI300X")),
        (Device("cpu", "cpu"), Target("cpu")),
    ],
)
def test_a_device_says_its_target(device, target):
    assert device_target(device) == target


def test_a_mesh_of_several_devices_is_part_of_the_target():
    assert mesh_target(one_device_mesh()) == Target("cpu")
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    target = mesh_target(mesh)
    assert (target.mesh, target.batch_shards, target.splits_rows_alone) == (mesh, 4, False)


@pytest.mark.parametrize(
    ("target", "platform", "kernel"),
    [
        (Target("tpu", "v5e"), "tpu", "attention_forward"),
        (Target("cuda", "H100", (9, 0)), "cuda", "__cudnn$fmhaSoftmax"),
        (Target("cpu"), "cpu", None),
    ],
    ids=["tpu", "cuda", "cpu"],
)
def test_the_step_is_lowered_for_any_target(monkeypatch, target, platform, kernel):
    # What JAX asks of the process itself where it has no GPU's plugin.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)
    mesh = one_device_mesh()
    _, _, shapes, step = make_parts(CLIP(VIT, dtype=jnp.bfloat16, target=target), mesh)
    traced = step.trace(shapes, batch_shapes(mesh, VIT, 16))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    kernels = ("attention_forward", "__cudnn$fmhaSoftmax")
    assert [name for name in kernels if name in text] == ([kernel] if kernel else [])


def test_only_the_loss_multiplies_in_float32_on_gpus(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)
    mesh, target = one_device_mesh(), Target("cuda", "H100", (9, 0))
    # cuDNN takes heads of 8 features or a multiple.
    config = dataclasses.replace(VIT, vision=dataclasses.replace(VIT.vision, heads=3))
    model = CLIP(config, dtype=jnp.bfloat16, remat="auto", target=target)
    _, _, shapes, step = make_parts(model, mesh)
    traced = step.trace(shapes, batch_shapes(mesh, config, 16))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).*: \((.*?)\) ->", text)
    features, logits = f"tensor<8x{VIT.embed_dim}xf32>", "tensor<8x8xf32>"
    assert len(products) > 50
    assert [types for types in products if "f32" in types] == [
        *2 * (f"{features}, {features}",),
        *2 * (f"{logits}, {features}",),
    ]


@pytest.mark.parametrize(("fsdp", "kernels"), [(1, True), (2, False)], ids=["whole", "cut"])
def test_weights_are_drawn_by_kernels_on_gpus_where_no_parameter_is_cut(fsdp, kernels):
    model, section = CLIP(VIT), TrainSection()
    optimizer = make_optimizer(lambda step: 1e-3, OptimSection())
    mesh = make_mesh(data=8 // fsdp, fsdp=fsdp, tensor=1)
    shapes = state_shapes(model, optimizer, mesh, section)
    init = make_init(model, optimizer, shapes, section, seed=0)
    lowered = init.lower(lowering_platforms=("cuda",)).as_text()
    assert ("cu_threefry2x32_ffi" in lowered) == kernels


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (4, 2), (1, 8)])
def test_gathers_run_beside_computation_on_tpus_that_share_the_model(data, fsdp):
    target = Target("tpu", "v5e", mesh=make_mesh(data=data, fsdp=fsdp, tensor=1))
    options = compiler_options(target)
    assert options is not None
    assert "xla_jf_spmd_threshold_for_windowed_einsum_mib" in options
    assert (
        set(ASYNC_GATHERS + GATHERS_IN_PRODUCTS) <= set(options) if fsdp > 1 else len(options) == 1
    )


@pytest.mark.parametrize(
    ("generation", "fsdp", "beside"),
    [("v5p", 8, True), ("v6e", 8, True), ("v5e", 8, False), ("v4", 8, False), ("v5p", 1, False)],
)
def test_sparse_cores_exchange_where_tpus_share_the_model(generation, fsdp, beside):
    target = Target("tpu", generation, mesh=make_mesh(data=8 // fsdp, fsdp=fsdp, tensor=1))
    options = compiler_options(target)
    assert options is not None
    assert {name in options for name in COLLECTIVES_ON_SPARSE_CORES} == {beside}
    in_products = fsdp > 1 and not beside
    assert {name in options for name in GATHERS_IN_PRODUCTS} == {in_products}
