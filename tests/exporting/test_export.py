"""Exported programs give the model's features for any number of images of any size."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny import VIT

from clip_jax.api import LoadedCLIP
from clip_jax.data.images import CLIPA, OPENAI, Preprocess, eval_transform
from clip_jax.errors import UserError
from clip_jax.exporting import check
from clip_jax.exporting.check import CAPTIONS, sample_images
from clip_jax.exporting.onnx_file import make_graph
from clip_jax.exporting.resize import prepare_images
from clip_jax.exporting.tower import tower_program
from clip_jax.pretrained.trees import array_shapes, to_variables
from clip_jax.pretrained.work_folder import RunDescription, write_work_folder
from clip_jax.tokenizers import TokenizerSpec
from clip_jax.tools.export import export_model, parse

LONGEST = Preprocess("longest", fill=7)


@pytest.mark.parametrize("preprocess", [OPENAI, CLIPA, LONGEST], ids=lambda p: p.resize_mode)
def test_images_are_prepared_as_on_the_host(preprocess):
    prepare = jax.jit(prepare_images, static_argnums=(1, 2))
    rng = np.random.default_rng(0)
    for height, width, size in ((301, 97, 64), (17, 30, 32)):
        image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        wanted = eval_transform(Image.fromarray(image), size, preprocess)
        levels = np.abs(prepare(image[None], size, preprocess)[0].astype(int) - wanted)
        assert levels.max() <= 1 and np.mean(levels > 0) < 0.01


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny model's work folder."""
    config = dataclasses.replace(
        VIT,
        vision=dataclasses.replace(VIT.vision, layers=1),
        text=dataclasses.replace(
            VIT.text, layers=1, context_length=16, vocab_size=49_408, eot_id=49_407
        ),
    )
    rng = np.random.default_rng(0)
    arrays = {
        path: rng.normal(0, 0.1, shape).astype(np.float32)
        for path, shape in array_shapes(config).items()
    }
    folder = tmp_path_factory.mktemp("run") / "model"
    folder.mkdir()
    description = RunDescription("tiny", config, TokenizerSpec(), OPENAI)
    write_work_folder(folder, description, arrays)
    return folder, LoadedCLIP("tiny", config, to_variables(arrays), tokenizer_spec=TokenizerSpec())


def test_stablehlo_runs_with_jax_alone(run, tmp_path):
    folder, clip = run
    export_model(parse([str(folder), str(tmp_path / "out")]))
    images = next(iter(sample_images()))
    batches = {"image": images, "text": clip.tokenize(CAPTIONS)}
    wanted = {
        "image": clip.encode_image(clip.preprocess(images)),
        "text": clip.encode_text(CAPTIONS),
    }
    for tower, batch in batches.items():
        program = export.deserialize(bytearray((tmp_path / f"out/{tower}.stablehlo").read_bytes()))
        weights = tmp_path / f"out/{tower}.safetensors"
        z_BD = program.call(load_file(weights), jnp.asarray(batch))
        np.testing.assert_allclose(z_BD, wanted[tower], atol=2e-5)
        with safe_open(weights, "numpy") as file:
            assert float(file.metadata()["largest_difference"]) < 2e-5


def test_int8_is_a_quarter_and_what_differs_too_much_is_not_written(run, tmp_path, monkeypatch):
    folder, _ = run
    arguments = [str(folder), str(tmp_path / "small"), "--int8", "--tower", "text"]
    (values,) = export_model(parse(arguments))
    assert values["weights"] == "int8"
    whole, small = folder / "model.safetensors", tmp_path / "small/text.safetensors"
    assert small.stat().st_size < 0.3 * whole.stat().st_size
    assert not (tmp_path / "small/image.stablehlo").exists()
    monkeypatch.setitem(check.BOUNDS, "int8", 1e-6)
    arguments[1] = str(tmp_path / "none")
    with pytest.raises(UserError, match="may by 1e-06; nothing was written; leave out --int8"):
        export_model(parse(arguments))
    assert not (tmp_path / "none").exists()


def test_onnx_without_its_packages_is_one_line(run, tmp_path, monkeypatch):
    folder, _ = run
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"needs onnx: pip install 'clip-jax-research\[onnx\]'"):
        export_model(parse([str(folder), str(tmp_path / "out"), "--format", "onnx"]))
    assert not (tmp_path / "out").exists()


def test_a_tower_is_a_graph_of_operators(run):
    _, clip = run
    program = tower_program(clip, "text", resizes=False, int8=True)
    batch = jax.ShapeDtypeStruct(export.symbolic_shape("batch, 16"), jnp.int32)
    graph, output = make_graph(program, program.arrays, "tokens", batch)
    # Matrices stay in int8 and are multiplied out; of masks and positions there are results alone.
    assert graph.constants["text/token_embedding/embedding"].dtype == np.int8
    known = {"tokens", *graph.constants}
    for operator in graph.operators:
        assert known.issuperset(operator.inputs)
        known.add(operator.output)
    assert output.name in known and output.shape[1] == 16
    assert sum(operator.kind == "MatMul" for operator in graph.operators) == 9
