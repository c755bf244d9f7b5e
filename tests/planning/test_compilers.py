"""Tests of the choice of a compiler, and one small program for each that is installed."""

import json
import subprocess
import sys

import pytest

from clip_jax.errors import UserError
from clip_jax.planning import compilers
from clip_jax.planning.compilers import (
    PACKAGES,
    TPU_TOPOLOGIES,
    Compiler,
    check_count,
    device_platform,
    find_compiler,
    required_versions,
    start_compiler,
)
from clip_jax.planning.cycles import CLOCKS
from clip_jax.planning.gpu_specs import GPU_SPECS, target_config
from clip_jax.planning.hardware import DEVICES

REQUIREMENTS = [
    'jaxlib<=0.10.2,>=0.10.2; extra == "tpu"',
    'libtpu==0.0.42.*; extra == "tpu"',
    'jax-cuda12-plugin[with-cuda]<=0.10.2,>=0.10.2; extra == "cuda12"',
    "numpy>=2.0",
]


def install(monkeypatch, *platforms, **versions):
    """Pretend that the compilers of these platforms are installed, in versions by package."""
    modules = {PACKAGES[p].module for p in platforms}
    monkeypatch.setattr(compilers, "_is_installed", lambda package: package.module in modules)
    known = {"jax": "0.10.2", "jaxlib": "0.10.2"} | {
        k.replace("_", "-"): v for k, v in versions.items()
    }

    def version(name):
        if name not in known:
            raise compilers.importlib.metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(compilers.importlib.metadata, "version", version)
    monkeypatch.setattr(compilers.importlib.metadata, "requires", lambda name: REQUIREMENTS)


def test_versions_that_jax_takes():
    tpu, cuda = (required_versions(PACKAGES[p], REQUIREMENTS) for p in ("tpu", "cuda"))
    assert "0.0.42.1" in tpu and "0.0.41" not in tpu
    assert "0.10.2" in cuda and "0.10.1" not in cuda
    assert "1.0" in required_versions(PACKAGES["tpu"], [])


def test_the_devices_own_compiler_is_taken_where_it_is_installed(monkeypatch):
    install(monkeypatch, "tpu", libtpu="0.0.42.1")
    compiler = find_compiler("tpu-v5e")
    assert (compiler.platform, compiler.name, compiler.version) == ("tpu", "libtpu", "0.0.42.1")
    assert compiler.is_devices_own
    assert find_compiler("tpu-v5e", "cpu").name == "jaxlib"
    assert find_compiler("h100").platform == find_compiler("v100").platform == "cpu"


@pytest.mark.parametrize(
    ("device", "choice", "message"),
    [
        ("tpu-v5e", "abacus", "--compiler is 'abacus'"),
        ("tpu-v5e", "cuda", "--compiler cuda does not compile for tpu-v5e"),
        ("h100", "cuda", r"jax-cuda12-plugin, which is not installed: pip install .*plan-gpu"),
        ("tpu-v5e", "auto", r"libtpu 0.0.41 is installed and jax 0.10.2 takes ==0.0.42.\*"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, device, choice, message):
    install(monkeypatch, "tpu", libtpu="0.0.41")
    with pytest.raises(UserError, match=message):
        find_compiler(device, choice)


@pytest.mark.parametrize("choice", ["auto", "own"])
@pytest.mark.parametrize(
    ("device", "versions", "message"),
    [
        (
            "tpu-v5e",
            {"libtpu_nightly": "0.1"},
            "module libtpu is there, and the package libtpu is not",
        ),
        ("h100", {"jax_cuda12_pjrt": "0.10.2"}, "the package jax-cuda12-plugin is not"),
        ("h100", {"jax_cuda12_plugin": "0.10.2"}, "the package jax-cuda12-pjrt is not"),
        (
            "h100",
            {"jax_cuda12_plugin": "0.10.2", "jax_cuda12_pjrt": "0.10.1"},
            r"jax-cuda12-pjrt 0.10.1 is installed and jax 0.10.2 takes .*==0\.10\.2",
        ),
    ],
)
def test_a_compiler_in_part_is_one_line(monkeypatch, device, choice, versions, message):
    platform = device_platform(device)
    install(monkeypatch, platform, **versions)
    with pytest.raises(UserError, match=message) as raised:
        find_compiler(device, platform if choice == "own" else choice)
    assert f"[{PACKAGES[platform].extra}]', or give --compiler cpu" in str(raised.value)
    assert find_compiler(device, "cpu").platform == "cpu"


def test_a_whole_compiler_for_gpus(monkeypatch):
    install(monkeypatch, "cuda", jax_cuda12_plugin="0.10.2", jax_cuda12_pjrt="0.10.2")
    assert find_compiler("h100") == Compiler("cuda", "jax-cuda12-plugin", "0.10.2")


def test_slices_that_are_not_rented_are_refused():
    tpu, cuda, cpu = (Compiler(platform, "", "") for platform in ("tpu", "cuda", "cpu"))
    with pytest.raises(UserError, match="a slice of tpu-v5e has one of 1, 2, 4, 8"):
        start_compiler(tpu, "tpu-v5e", 12, "")
    with pytest.raises(UserError, match="machines of h100 hold 8"):
        start_compiler(cuda, "h100", 12, "")
    for compiler, device, count in [(tpu, "tpu-v5e", 8), (cuda, "h100", 3), (cpu, "tpu-v5e", 12)]:
        check_count(compiler, device, count)


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_has_its_compiler(device):
    platform = device_platform(device)
    assert platform == (
        "tpu" if device.startswith("tpu-") else "cpu" if device == "v100" else "cuda"
    )
    assert (device in TPU_TOPOLOGIES) == (device in CLOCKS)
    if device in GPU_SPECS:
        spec = GPU_SPECS[device]
        assert f"device_memory_size: {spec.memory}\n" in target_config(spec)
        # What the driver gives is what the data sheet sells, to some percent.
        assert spec.memory == pytest.approx(DEVICES[device].memory, rel=0.08)
        assert spec.memory_bandwidth == pytest.approx(DEVICES[device].memory_bandwidth, rel=0.05)


@pytest.mark.parametrize("shapes", [shapes for _, shapes, _ in TPU_TOPOLOGIES.values()])
def test_a_slice_has_as_many_chips_as_are_asked_for(shapes):
    for count, shape in shapes.items():
        chips = 1
        for side in shape.split("x"):
            chips *= int(side)
        assert chips == max(count, 4)


def run_plan(tmp_path, device, *flags):
    path = tmp_path / "plan.json"
    arguments = [
        *("--config", "experiments/emoji_vit.py", "--config.data.tokenizer=clip"),
        *("--config.eval.data=", "--config.model.dtype=bfloat16", "--devices", "4"),
        *("--device", device, "--json", str(path), *flags),
    ]
    line = [sys.executable, "-m", "clip_jax.plan", *arguments]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def is_installed(platform):
    return compilers._is_installed(PACKAGES[platform])


@pytest.mark.skipif(not is_installed("tpu"), reason="needs the extra plan-tpu")
def test_a_small_program_for_tpus(tmp_path):
    plan, text = run_plan(tmp_path, "tpu-v5e", "--top", "3")
    assert plan["compiler"]["name"] == "libtpu" and plan["fits"]
    assert plan["estimated_by"] == "cycles" and plan["counted_share"] > 0.99
    assert sum(x["seconds"] for x in plan["breakdown"]) == pytest.approx(plan["estimated_seconds"])
    parts = {(x["tower"], x["pass"], x["part"]) for x in plan["breakdown"]}
    for tower in ("image", "text"):
        for direction in ("forward", "backward"):
            assert {(tower, direction, p) for p in ("attention", "projections", "MLP")} <= parts
    assert 0 < plan["temp_bytes"] < plan["memory_bytes"] < 1e9
    assert "compiled by XLA for TPUs (libtpu" in text and "the instructions that take" in text


@pytest.mark.skipif(not is_installed("cuda"), reason="needs the extra plan-gpu")
def test_a_small_program_for_gpus(tmp_path):
    plan, text = run_plan(tmp_path, "h100")
    assert plan["compiler"]["platform"] == "cuda" and plan["fits"]
    assert plan["estimated_by"] == "roofline" and plan["counted_share"] is None
    assert any(c["beside_computation"] for c in plan["collectives"])
    assert "compiled by XLA for NVIDIA GPUs" in text
