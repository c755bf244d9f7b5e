"""Starting from a checkpoint: every array in its place, and what belongs to weights with them."""

import dataclasses
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pairs import run_losses, tiny_config, write_data
from tiny import CONVNET, RESNET, SIGLIP
from tiny import SHALLOW as VIT

import clip_jax
from clip_jax import main
from clip_jax.data.images import Preprocess
from clip_jax.errors import UserError
from clip_jax.models import zoo
from clip_jax.models.clip import CLIP
from clip_jax.parallel.mesh import make_mesh
from clip_jax.pretrained import tags
from clip_jax.pretrained.resize import (
    resize_checkpoint,
    resize_image_positions,
    resize_text_positions,
)
from clip_jax.pretrained.trees import from_variables
from clip_jax.pretrained.work_folder import read_description, write_description
from clip_jax.sections import TrainSection
from clip_jax.tokenizers.train import train as train_tokenizer
from clip_jax.tools.convert import convert
from clip_jax.training import setup
from clip_jax.training.state import state_shapes
from clip_jax.training.warm_start import place_source, read_source, warm_start_sizes

GOLDEN = Path(__file__).parents[1] / "golden" / "published"
FILES = {name: GOLDEN / name for name in ("openai/model.pt", "open_clip", "hf_clip", "hf_siglip")}


def of_layers(config, layers=1):
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, layers=layers),
        text=dataclasses.replace(config.text, layers=layers, context_length=16),
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, pattern = write_data(tmp_path_factory.mktemp("pairs"))
    train_tokenizer(str(folder / "names.txt"), str(folder / "other.model"), 278)
    return folder, pattern


@pytest.fixture(scope="module", autouse=True)
def tiny_models():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(zoo.MODELS, "tiny", of_layers(VIT))
        patch.setitem(zoo.MODELS, "tiny-siglip", of_layers(SIGLIP))
        patch.setitem(zoo.MODELS, "tiny-rn", RESNET)
        patch.setitem(zoo.MODELS, "tiny-conv", CONVNET)
        yield


def losses(workdir):
    return [loss for _, loss in run_losses(workdir)]


@pytest.fixture(scope="module")
def short(data, tmp_path_factory):
    """Train on small images and short captions; the run has a preprocessing of its own."""
    workdir = tmp_path_factory.mktemp("short")
    config = tiny_config(data, model__image_size=16, model__context_length=8)
    assert main.run(config, str(workdir)) == 0
    kind = Preprocess("squash", "bilinear", (0.4, 0.5, 0.6), (0.3, 0.2, 0.1))
    write_description(workdir, dataclasses.replace(read_description(workdir), preprocess=kind))
    return workdir


def place(source, sizes, mesh, scan=False):
    """Place the variables of a run's first step; check that they lie as the state does."""
    model = CLIP(sizes, scan=scan)
    shapes = state_shapes(model, optax.sgd(1.0), mesh, TrainSection())
    wanted = {"params": shapes.params, "batch_stats": shapes.batch_stats}
    variables = place_source(source, sizes, wanted, mesh)
    same = jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s.sharding, x.ndim), variables, wanted
    )
    assert all(jax.tree.leaves(same))
    return variables


def start_of(run):
    """Return the variables of a run's first step."""
    wanted = {"params": run.shapes.params, "batch_stats": run.shapes.batch_stats}
    return place_source(run.source, run.model.config, wanted, run.mesh)


@pytest.mark.parametrize("name", FILES)
def test_a_published_file_is_placed_bit_for_bit(name):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    source = read_source(str(FILES[name]), "any")
    sizes = warm_start_sizes(source, source.checkpoint.config)
    got = from_variables(*place(source, sizes, mesh).values())
    clip = clip_jax.load(FILES[name])
    want = from_variables(clip.params, clip.batch_stats)
    assert got.keys() == want.keys()
    for path in want:
        np.testing.assert_array_equal(got[path], want[path])


def test_layers_are_stacked_for_a_scan():
    config = of_layers(VIT, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(zoo.MODELS, "deep", config)
        clip = clip_jax.create("deep")
    arrays = from_variables(clip.params, clip.batch_stats)
    source = read_source(str(FILES["open_clip"]), "any")
    readers = {path: (lambda array=array: array) for path, array in arrays.items()}
    source = dataclasses.replace(
        source, checkpoint=dataclasses.replace(source.checkpoint, config=config, arrays=readers)
    )
    got = place(source, config, make_mesh(data=8, fsdp=1, tensor=1), scan=True)
    stack = got["params"]["text"]["transformer"]["resblocks"]["mlp"]["c_fc"]["kernel"]
    for layer in range(2):
        path = f"text/transformer/resblocks_{layer}/mlp/c_fc/kernel"
        np.testing.assert_array_equal(stack[layer], arrays[path])


@pytest.mark.slow
def test_a_longer_run_grows_the_positions_of_a_short_one(data, short, tmp_path, capsys):
    config = tiny_config(data, model__init_from=str(short))
    assert main.run(config, str(tmp_path)) == 0
    assert f"starting from {short}" in capsys.readouterr().out

    run = setup.build_run(config, 3)
    assert (run.model.config.vision.image_size, run.model.config.text.context_length) == (32, 16)
    got = from_variables(*start_of(run).values())
    clip = clip_jax.load(short)
    want = from_variables(clip.params, clip.batch_stats)
    image, text = "visual/positional_embedding", "text/positional_embedding"
    want[image] = resize_image_positions(want[image], (2, 2), (4, 4))
    want[text] = np.concatenate([want[text], np.repeat(want[text][-1:], 8, axis=0)])
    for path in want:
        np.testing.assert_array_equal(got[path], want[path])

    # Images and tokenizer traveled with the weights, into the new run's own folder.
    about, before = read_description(tmp_path), read_description(short)
    assert about.preprocess == before.preprocess == run.preprocess
    assert clip_jax.load(tmp_path).preprocessing.mean == (0.4, 0.5, 0.6)
    assert Path(about.tokenizer.file).read_bytes() == Path(before.tokenizer.file).read_bytes()


def test_captions_that_fitted_have_the_features_they_had(data, short):
    """However long the captions of the next run: its tower is causal and read at the end token."""
    run = setup.build_run(tiny_config(data, model__init_from=str(short)), 1)
    clip = clip_jax.load(short)
    texts = ["red", "a dot"]
    assert clip.tokenize(texts)[:, -1].tolist() == [run.tokenizer.pad_id] * 2  # not cut
    grown = run.model.apply(
        start_of(run), jnp.asarray(run.tokenizer(texts, 16)), method="encode_text"
    )
    want = clip.encode_text(clip.tokenize(texts), normalize=False)
    # Float32 sums over rows of another length.
    np.testing.assert_allclose(grown, want, atol=1e-5)


def test_a_tower_that_sees_its_padding_is_interpolated():
    positions = np.random.default_rng(0).standard_normal((10, 32)).astype(np.float32)
    source = read_source(str(FILES["hf_siglip"]), "any")
    arrays = dict(source.checkpoint.arrays)
    arrays["text/positional_embedding"] = lambda: positions
    grown = resize_checkpoint(
        dataclasses.replace(source.checkpoint, arrays=arrays), None, 16, grow_text=True
    ).arrays["text/positional_embedding"]()
    np.testing.assert_array_equal(grown, resize_text_positions(positions, 16))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["own", "hf", "open_clip"])
def test_a_converted_run_is_the_same_start(data, short, tmp_path, to):
    convert(str(short), str(tmp_path / "made"), to=to)
    config = tiny_config(
        data, model__init_from=str(tmp_path / "made"), model__image_size=16, model__context_length=8
    )
    run = setup.build_run(config, 1)
    got = from_variables(*start_of(run).values())
    clip = clip_jax.load(short)
    want = from_variables(clip.params, clip.batch_stats)
    for path in want:
        np.testing.assert_array_equal(got[path], want[path])
    texts = ["red square", "a green dot"]
    np.testing.assert_array_equal(run.tokenizer(texts, 8), clip.tokenize(texts))
    if to == "open_clip":  # whose JSON has all of a Preprocess
        assert run.preprocess == clip.preprocessing


def test_the_first_loss_is_that_of_the_weights(data, short, tmp_path):
    """The same batches again: lower than from random weights, and the same in another format."""
    sizes = {"model__image_size": 16, "model__context_length": 8, "train__steps": 1}
    convert(str(short), str(tmp_path / "made"), to="own")
    for name, source in (("again", short), ("other", tmp_path / "made")):
        config = tiny_config(data, model__init_from=str(source), **sizes)
        assert main.run(config, str(tmp_path / name)) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "other")
    assert losses(tmp_path / "again")[0] < losses(short)[0]


def test_a_run_that_is_resumed_needs_its_source_no_more(data, short, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(short, source)
    config = tiny_config(data, model__init_from=str(source), train__steps=2)
    assert main.run(config, str(tmp_path / "run")) == 0
    shutil.rmtree(source)
    longer = tiny_config(data, model__init_from=str(source), train__steps=3)
    assert main.run(longer, str(tmp_path / "run")) == 0
    assert "going on from step 2" in capsys.readouterr().out
    assert read_description(tmp_path / "run").preprocess.mean == (0.4, 0.5, 0.6)
    with pytest.raises(UserError, match=r'made with config.model.init_from = .* and now it is ""'):
        main.run(tiny_config(data, train__steps=4), str(tmp_path / "run"))


@pytest.fixture(scope="module")
def siglip(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("siglip")
    config = tiny_config(data, model__name="tiny-siglip", train__loss="sigmoid", train__steps=2)
    assert main.run(config, str(workdir)) == 0
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_siglips_scale_and_bias(data, siglip, tmp_path, loss):
    """The sigmoid loss goes on with both; to the softmax the bias is nothing, and it stays."""
    before = jax.device_get(clip_jax.load(siglip).params)
    assert before["logit_bias"] != -10.0
    config = tiny_config(
        data,
        model__name="tiny-siglip",
        model__init_from=str(siglip),
        train__loss=loss,
        train__steps=2,
    )
    start = jax.device_get(start_of(setup.build_run(config, 2))["params"])
    assert start["logit_bias"] == before["logit_bias"]
    assert start["logit_scale"] == before["logit_scale"]
    assert main.run(config, str(tmp_path)) == 0
    after = jax.device_get(clip_jax.load(tmp_path).params)
    assert (after["logit_bias"] == before["logit_bias"]) == (loss == "softmax")
    assert after["logit_scale"] != before["logit_scale"]


def test_a_sigmoid_run_starts_its_own_scale_where_there_is_no_bias(data, short):
    config = tiny_config(data, model__init_from=str(short), train__loss="sigmoid")
    start = start_of(setup.build_run(config, 2))["params"]
    assert float(start["logit_bias"]) == -10.0
    assert float(start["logit_scale"]) == np.float32(math.log(10.0))


def test_a_model_without_a_bias_leaves_it_behind(data, siglip):
    with pytest.MonkeyPatch.context() as patch:
        plain = dataclasses.replace(zoo.MODELS["tiny-siglip"], init_logit_bias=None)
        patch.setitem(zoo.MODELS, "plain", plain)
        config = tiny_config(data, model__name="plain", model__init_from=str(siglip))
        start = start_of(setup.build_run(config, 2))["params"]
    assert set(start) == {"visual", "text", "logit_scale"}


def test_mistakes_are_one_clear_line(data, short, tmp_path):
    folder, _ = data

    def refuses(message, **changes):
        changes.setdefault("model__init_from", str(short))
        with pytest.raises(UserError, match=message) as caught:
            main.run(tiny_config(data, **changes), str(tmp_path / "run"))
        assert "\n" not in str(caught.value)

    other = str(folder / "other.model")
    refuses(r"other.model \(278 entries.* is not the tokenizer of", data__tokenizer=other)
    refuses("holds tiny, which is not the model that config.model.name", model__name="tiny-siglip")
    refuses("nothing does not exist", model__init_from="nothing")
    refuses("scale of .* above config.optim.max_logit_scale 10; raise", optim__max_logit_scale=10.0)
    bare = str(FILES["hf_siglip"])
    refuses("40 entries.*give the one it was trained with", model__init_from=bare)
    refuses("came without its tokenizer", model__init_from=bare, data__tokenizer="clip")
    refuses("multiples of 32", model__init_from="", model__name="tiny-rn", model__image_size=50)
    refuses("takes 32 alone", model__init_from="", model__name="tiny-conv", model__image_size=64)
    refuses("takes 8 or more", model__init_from="", model__image_size=4)


def test_a_tag_says_how_a_bare_file_was_trained(data, short, tmp_path, monkeypatch):
    made = of_layers(VIT)
    vision = dataclasses.replace(made.vision, image_size=16)
    text = dataclasses.replace(made.text, context_length=8, vocab_size=280, eot_id=1)
    for name, activation in (("tiny", "gelu"), ("tiny-quickgelu", "quick_gelu")):
        sizes = zoo.clip(made.embed_dim, vision, text, activation)
        monkeypatch.setitem(zoo.MODELS, name, sizes)
    kind = Preprocess("squash", "bilinear", (0.4, 0.5, 0.6), (0.3, 0.2, 0.1))
    monkeypatch.setitem(tags.TAGS, "tiny", "plain quick*")
    monkeypatch.setitem(tags._EXCEPTIONS, ("tiny", "quick"), kind)
    convert(str(short), str(tmp_path), to="open_clip")
    bare = (tmp_path / "open_clip_model.safetensors").rename(tmp_path / "bare.safetensors")

    def run_with(tag):
        config = tiny_config(data, model__init_from=str(bare), model__init_tag=tag)
        return setup.build_run(config, 1)

    tagged = run_with("quick")
    assert tagged.preprocess == kind and tagged.model.config.text.activation == "quick_gelu"
    assert run_with("plain").model.config.text.activation == "gelu"
    with pytest.raises(UserError, match="no such pretrained pair"):
        run_with("unheard_of")


def test_the_tokenizer_comes_from_the_checkpoint(data, short):
    run = setup.build_run(tiny_config(data, data__tokenizer="clip", model__init_from=str(short)), 1)
    assert run.tokenizer_spec == read_description(short).tokenizer
    assert run.tokenizer.vocab_size == 280
