"""Runs with teachers: what they learn, and that stored features are the computed ones."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from fake_cluster import FakeCluster
from pairs import run_losses, tiny_config, write_data
from tiny import CONVNET, ONE_LAYER

import clip_jax
from clip_jax import main
from clip_jax.data.loader import Batch
from clip_jax.errors import UserError
from clip_jax.models import zoo
from clip_jax.parallel.mesh import AXES, make_mesh
from clip_jax.tools.data_reinforce import reinforce_on, result_text
from clip_jax.training import stored_features, teachers
from clip_jax.training.distillation import split_captions
from clip_jax.training.reinforce import reinforce
from clip_jax.training.replay import replay
from clip_jax.training.teachers import BLOCK_ROWS, load_teachers

STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(autouse=True, scope="module")
def tiny_models():
    """A student, and a teacher of another width and other towers."""
    teacher = dataclasses.replace(
        CONVNET,
        embed_dim=24,
        vision=dataclasses.replace(CONVNET.vision, image_size=48),
        text=dataclasses.replace(ONE_LAYER.text, context_length=24),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(zoo.MODELS, "tiny", ONE_LAYER)
        patch.setitem(zoo.MODELS, "teacher", teacher)
        patch.setattr(stored_features, "PART_ROWS", 40)
        yield


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    assert main.run(tiny_config(data, model__name="teacher", train__steps=2), str(folder)) == 0
    return folder


def distil_config(data, teachers, **changes):
    values = {
        "distill__teachers": tuple(map(str, teachers)),
        "distill__feature_weight": 0.5,
        "distill__temperature": 2.0,
        "train__steps": STEPS,
        "data__flip": 0.5,
        "checkpoint__every": 2,
    }
    return tiny_config(data, **values | changes)


@pytest.fixture(scope="module")
def live_run(data, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    assert main.run(distil_config(data, [teacher]), str(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def features(data, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    first = reinforce(distil_config(data, [teacher]), folder, process_index=1, process_count=2)
    assert first.missing and first.made
    made = reinforce(distil_config(data, [teacher]), folder, progress=False)
    assert not made.missing and "24 features" in result_text(made)
    return folder


def test_a_teacher_is_computed_with_its_checked_model(teacher, monkeypatch):
    made, make = [], teachers.make_block_encoder

    def checked(model, trace):
        trace(model)
        return model.clone(attention="xla")

    def record(model, *args):
        made.append(model.attention)
        return make(model, *args)

    monkeypatch.setattr(teachers, "with_checked_kernels", checked)
    monkeypatch.setattr(teachers, "make_block_encoder", record)
    load_teachers([str(teacher)], make_mesh(data=8, fsdp=1, tensor=1), dtype="float32")
    assert made == ["auto", "xla"]


def test_a_row_does_not_depend_on_its_batch(teacher):
    """Another order, another size of the batch and another mesh: the same bits."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (48, 32, 32, 3)).astype(np.uint8)
    one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)
    live = load_teachers([str(teacher)], one, dtype="float32")
    tokens = rng.integers(1, 60, (48, 24)).astype(np.int32)
    whole = jax.device_get(live.encode(images, tokens))
    order = rng.permutation(48)
    many = load_teachers([str(teacher)], make_mesh(data=4, fsdp=2, tensor=1), dtype="float32")
    assert many.infos == live.infos
    for name, z_BD in jax.device_get(many.encode(images[order], tokens[order])).items():
        assert z_BD.dtype == np.float16
        np.testing.assert_array_equal(z_BD, whole[name][order])
        np.testing.assert_allclose(np.linalg.norm(z_BD.astype(np.float32), axis=1), 1, atol=1e-3)
    for name, z_BD in jax.device_get(live.encode(images[5:21], tokens[5:21])).items():
        np.testing.assert_array_equal(z_BD, whole[name][5:21])
    assert len(images) % BLOCK_ROWS and len(images) > BLOCK_ROWS


def test_the_teachers_captions_are_taken_out_of_a_batch():
    """Negatives are tokenized with the captions, and no teacher sees them."""
    rows_BL = np.arange(20, dtype=np.int32).reshape(2, 10)
    batch = Batch(text=rows_BL, negative=rows_BL + 1)
    split_captions(batch, 4)
    np.testing.assert_array_equal(batch["text"], rows_BL[:, :4])
    np.testing.assert_array_equal(batch["teacher_text"], rows_BL[:, 4:])
    np.testing.assert_array_equal(batch["negative"], rows_BL[:, :4] + 1)


@pytest.mark.slow
def test_stored_features_give_the_run_its_very_losses(data, teacher, live_run, features, tmp_path):
    stored = distil_config(data, [], distill__features=str(features))
    assert main.run(stored, str(tmp_path / "stored")) == 0
    assert run_losses(tmp_path / "stored") == run_losses(live_run)
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "stored", live_run)
    ]
    for name in ("affinity_loss", "feature_loss", "contrastive_loss"):
        assert [line[name] for line in lines[0]] == [line[name] for line in lines[1]]
    # A resumed run may go over from the one to the other.
    longer = dataclasses.replace(stored, train=dataclasses.replace(stored.train, steps=STEPS + 1))
    assert main.run(longer, str(live_run)) == 0
    assert run_losses(live_run)[-1][0] == STEPS + 1
    found = replay(live_run, STEPS + 1)
    assert found.is_equal


@pytest.mark.slow
def test_the_student_is_a_model_like_any_other(live_run):
    loaded = clip_jax.load(live_run)
    assert set(loaded.params) == {"visual", "text", "logit_scale"}
    assert loaded.encode_text("a red bar").shape == (1, ONE_LAYER.embed_dim)


@pytest.mark.slow
def test_features_of_something_else_are_refused(data, teacher, live_run, features, tmp_path):
    def refused(match, teachers=(), **changes):
        config = distil_config(data, teachers, distill__features=str(features), **changes)
        with pytest.raises(UserError, match=match):
            main.run(config, str(tmp_path / "refused"))

    refused("another teachers", teachers=[live_run])
    refused(r"another config\.seed \(0, now 1\)", seed=1)
    refused(r"another config\.data\.crop_scale", data__crop_scale=(0.5, 1.0))
    refused("lacks .* begin .* epochs", train__steps=500)
    with pytest.raises(UserError, match=r"begun with another config\.data\.flip"):
        reinforce(distil_config(data, [teacher], data__flip=0.0), features)
    with pytest.raises(UserError, match=r"holds no features\.json"):
        main.run(distil_config(data, [], distill__features=str(tmp_path)), str(tmp_path / "x"))
    # A run of another teacher does not go on.
    with pytest.raises(UserError, match="made with the teachers' weights"):
        main.run(distil_config(data, [teacher, teacher]), str(live_run))


@pytest.mark.slow
def test_a_cluster_writes_the_same_files(data, teacher, features, tmp_path):
    def dies(method, args, number):
        return "after" if number == 4 else ""

    config = distil_config(data, [teacher])
    result = reinforce_on(FakeCluster(2, dies), config, tmp_path / "many", 0)
    assert result.made == 3 and not result.missing and result.folder.samples == 96
    many, alone = (
        {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (tmp_path / "many", features)
    )
    assert many == alone


@pytest.mark.slow
def test_micro_batches_and_two_teachers(data, teacher, tmp_path):
    """GradCache's gradient is the plain one, and twice the same teacher teaches the same."""
    losses = []
    for name, options in {
        "plain": {"train__microbatch_size": 0},
        "cached": {"train__microbatch_size": 8},
        "two": {"distill__teachers": (str(teacher),) * 2, "distill__feature_weight": 0.0},
        "one": {"distill__feature_weight": 0.0},
    }.items():
        config = distil_config(data, [teacher], **options)
        assert main.run(config, str(tmp_path / name)) == 0
        losses.append([loss for _, loss in run_losses(tmp_path / name)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    np.testing.assert_allclose(losses[2], losses[3], rtol=1e-5)
