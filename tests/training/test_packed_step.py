"""Packed captions: the plain step's values and gradients, and runs that resume to the bit."""

import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import pytest
from pairs import run_losses, tiny_config, write_data
from steps import HALF, make_batch, one_device_mesh, shallow
from tiny import SIGLIP, VIT

from clip_jax import main
from clip_jax.data.caption_packing import CaptionPacking, pack_captions, parse_shares
from clip_jax.errors import UserError
from clip_jax.losses import make_loss
from clip_jax.models import zoo
from clip_jax.models.clip import CLIP, init_variables
from clip_jax.parallel.mesh import BATCH_AXES, batch_shards, make_mesh, place_batch
from clip_jax.planning.program import batch_of_run
from clip_jax.training import caption_shares, unpacked_steps
from clip_jax.training.setup import build_run
from clip_jax.training.step import make_cached_gradient, make_features, make_whole_gradient
from clip_jax.training.trainer import Trainer

MODEL = shallow(VIT, 1)


def short_batch():
    """Return a batch in which every other caption is short."""
    batch = make_batch(MODEL)
    batch["text"][::2, 5] = MODEL.text.eot_id
    batch["text"][::2, 6:] = 0
    return batch


def packed(batch, packing):
    captions = pack_captions(batch["text"], MODEL.text.eot_id, packing)
    return {k: v for k, v in batch.items() if k != "text"} | captions


@pytest.mark.parametrize(
    ("devices", "microbatch_size", "captions", "segments", "how"),
    [
        (1, 8, 8, 4, {"remat": "minimal"}),
        pytest.param(8, 0, 2, 1, {"scan": True}, marks=pytest.mark.slow),
        pytest.param(1, 0, 16, 8, {}, marks=pytest.mark.slow),
        pytest.param(1, 0, 16, 8, {"remat": "minimal", "scan": True}, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_the_plain_forms(
    devices, microbatch_size, captions, segments, how
):
    mesh = one_device_mesh() if devices == 1 else make_mesh(data=4, fsdp=2, tensor=1)
    packing = CaptionPacking(captions, segments, 32, 15.0)
    model = CLIP(MODEL, **how)
    variables = init_variables(model, 0)
    features = make_features(model, mesh=mesh, preprocess=HALF, frozen=())
    loss_fn = make_loss(
        "softmax",
        mesh=mesh,
        batch_axes=BATCH_AXES,
        platform="cpu",
        tile_size=8,
        mask_equal_captions=True,
    )
    gradient = make_whole_gradient(features, loss_fn)
    if microbatch_size:
        places = jax.tree.map(lambda x: jax.NamedSharding(mesh, jax.P()), variables["params"])
        gradient = make_cached_gradient(
            features, loss_fn, places, mesh=mesh, microbatch_size=microbatch_size
        )
    batch = short_batch()
    results = [
        jax.jit(gradient)(variables["params"], {}, {}, place_batch(rows, mesh))
        for rows in (batch, packed(batch, packing))
    ]
    (want, _, want_grads), (got, _, got_grads) = results
    chex.assert_trees_all_close(got, want, rtol=1e-6)
    # Each weight's gradient is a sum over the tokens of 16 captions, here in another order: some
    # roundings of the largest term, 1.2e-7 of it each.
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(want_grads))
    chex.assert_trees_all_close(got_grads, want_grads, rtol=1e-5, atol=1e-6 * scale)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    text = dataclasses.replace(MODEL.text, context_length=16)
    monkeypatch.setitem(zoo.MODELS, "tiny", dataclasses.replace(MODEL, text=text))


def logged(workdir, name):
    """Return a metric of every step."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[name] for line in lines]


@pytest.mark.parametrize(
    ("segment_rows", "steps"),
    [(32, 2), pytest.param(20, 4, marks=pytest.mark.slow)],
    ids=["all_fit", "some_do_not_fit"],
)
def test_a_run_with_packed_captions_resumes_to_the_bit(
    data, tmp_path, monkeypatch, capsys, segment_rows, steps
):
    """The lengths are counted once; a resumed run takes what the first has written down."""
    lengths = []
    dispatch = Trainer.dispatch

    def noted(trainer, batch):
        lengths.append(batch.length)
        return dispatch(trainer, batch)

    monkeypatch.setattr(Trainer, "dispatch", noted)
    monkeypatch.setattr(caption_shares, "may_pack", lambda run: True)
    monkeypatch.setattr(caption_shares, "WORTH", 10.0)
    monkeypatch.setattr(unpacked_steps, "LEAST", 1)
    monkeypatch.setattr("clip_jax.data.caption_packing.COUNTED_LENGTHS", (6, 8))
    packing = CaptionPacking(4, 2, segment_rows, 9.0)
    monkeypatch.setattr("clip_jax.training.setup.choose_packing", lambda *_: packing)
    half = steps // 2
    config = tiny_config(data, train__steps=steps, train__batch_size=32, checkpoint__every=half)
    assert main.run(config, str(tmp_path / "whole")) == 0
    written = json.loads((tmp_path / "whole/config.json").read_text())["config"]["data"]
    shares = parse_shares(written["caption_packing"])
    assert list(shares) == [6, 8]
    others = [length for length in lengths if length != packing]
    assert len(lengths) == steps and len(others) < steps
    assert bool(others) == (segment_rows == 20) and set(others) <= {16}
    assert logged(tmp_path / "whole", "unpacked") == [length != packing for length in lengths]
    assert capsys.readouterr().out.count(" did not fit into 2 segments") == bool(others)

    parts = tmp_path / "parts"
    shutil.copytree(tmp_path / "whole", parts)
    shutil.rmtree(parts / f"checkpoints/{steps}")
    monkeypatch.setattr(caption_shares, "count_lengths", None)  # not called again
    assert main.run(config, str(parts)) == 0
    assert lengths[steps:] == lengths[half:steps]
    assert run_losses(parts) == run_losses(tmp_path / "whole")


def test_on_cpus_and_for_few_pairs_nothing_changes(data, tmp_path):
    config = tiny_config(data, train__batch_size=32)
    run = build_run(config, 3)
    assert not caption_shares.may_pack(run) and run.caption_packing is None
    settled = caption_shares.with_caption_packing(run, None, tmp_path)
    assert settled.config.data.caption_packing == "off" and settled.caption_packing is None


def test_a_plan_takes_the_packing_of_the_config(data):
    config = tiny_config(data, train__batch_size=64, data__caption_packing="4:0.5")
    run = build_run(config, 3)
    rows = 64 // batch_shards(run.mesh)
    assert run.caption_packing.captions == rows and run.caption_packing.segment_rows == 128
    shapes = batch_of_run(run)
    assert "text" not in shapes and shapes["text_end"].shape == (64,)
    segments = batch_shards(run.mesh) * run.caption_packing.segments
    assert shapes["text_tokens"].shape == shapes["text_positions"].shape == (segments, 128)


def test_shares_are_refused_for_a_tower_that_sees_its_padding(data, monkeypatch):
    monkeypatch.setitem(zoo.MODELS, "padded", SIGLIP)
    shares = tiny_config(data, model__name="padded", data__caption_packing="4:0.5")
    words = r'tower of padded takes .* leave config\.data\.caption_packing "auto" or "off"$'
    with pytest.raises(UserError, match=words):
        build_run(shares, 3)
    for choice in ("auto", "off"):
        config = tiny_config(data, model__name="padded", data__caption_packing=choice)
        assert build_run(config, 3).caption_packing is None
