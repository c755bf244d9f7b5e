"""What the doctor says of packages, from lists of versions."""

import importlib.metadata

from clip_jax.diagnosis.packages import (
    EXTRAS,
    find_extras,
    look_at_packages,
    plugin_problems,
    requirement_problems,
)

REQUIREMENTS = (
    "jax<0.13,>=0.10",
    "ml-collections<2,>=1.0",
    'onnx<2,>=1.17; extra == "onnx"',
    'onnxruntime<2,>=1.20; extra == "onnx"',
    'jax[cuda12]; extra == "gpu"',
)
JAX = ("jaxlib<=0.12.0.1,>=0.12.0", 'libtpu==0.0.40.*; extra == "tpu"')


def test_a_requirement_that_is_not_met_is_told_with_the_command():
    versions = {"jax": "0.9.2", "ml-collections": "1.1.0"}
    (line,) = requirement_problems(REQUIREMENTS, versions)
    assert line == "jax is 0.9.2: pip install 'jax<0.13,>=0.10'"
    (line,) = requirement_problems(REQUIREMENTS, {"jax": "0.12.0.1"})
    assert line.startswith("ml-collections is not installed: pip install 'ml-collections<2")


def test_extras_say_what_they_lack():
    versions = {"jax": "0.12.0", "onnx": "1.23.2", "onnxruntime": "1.2"}
    missing = {e.name: e.missing for e in find_extras(REQUIREMENTS, versions)}
    assert missing["onnx"] == ("onnxruntime<2,>=1.20",)
    # jax itself is there; the plug-in that its extra brings is not.
    assert missing["gpu"] == ("jax[cuda12]",)
    there = find_extras(REQUIREMENTS, versions | {"jax-cuda12-plugin": "0.12.0"})
    assert {e.name: e.missing for e in there}["gpu"] == ()
    assert find_extras((), versions) == ()


def test_plugins_are_in_step_with_jax():
    fit = {"jax": "0.12.0.1", "jaxlib": "0.12.0.1", "libtpu": "0.0.40"}
    assert plugin_problems(fit | {"jax-cuda12-plugin": "0.12.0.1"}, JAX) == []
    left_behind = fit | {"jax-cuda12-plugin": "0.10.2", "libtpu": "0.0.31"}
    cuda, tpu = plugin_problems(left_behind, JAX)
    assert "jax-cuda12-plugin 0.10.2" in cuda and "pip install -U 'jax[cuda12]==0.12.0.1'" in cuda
    assert "libtpu 0.0.31" in tpu and "'jax[tpu]==0.12.0.1'" in tpu
    (line,) = plugin_problems({"jax": "0.12.0.1", "jaxlib": "0.10.2"}, JAX)
    assert "jaxlib 0.10.2 does not fit jax 0.12.0.1" in line
    assert plugin_problems({}, ()) == []


def test_every_extra_for_users_is_described():
    found = look_at_packages()
    assert found.versions["jax"] == importlib.metadata.version("jax")
    assert {extra.name for extra in found.extras} in (set(), set(EXTRAS))
