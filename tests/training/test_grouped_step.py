"""Captions in groups: the plain step's values and gradients, and runs that resume to the bit."""

import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import run_losses, tiny_config, write_data
from steps import HALF, make_batch, one_device_mesh, shallow
from tiny import VIT

from clip_jax import main
from clip_jax.data.caption_groups import CaptionGroups, group_captions, parse_shares
from clip_jax.data.loader import caption_lengths
from clip_jax.losses import make_loss
from clip_jax.models import zoo
from clip_jax.models.clip import CLIP, init_variables, put_in_order
from clip_jax.parallel.mesh import BATCH_AXES, batch_shards, make_mesh, place_batch
from clip_jax.planning.counts import find_collectives
from clip_jax.planning.hlo import parse_program
from clip_jax.planning.program import batch_of_run
from clip_jax.training import batch_feed, caption_shares
from clip_jax.training.setup import build_run
from clip_jax.training.step import make_cached_gradient, make_features, make_whole_gradient

MODEL = shallow(VIT, 1)


def short_batch():
    """Return a batch in which every other caption is short."""
    batch = make_batch(MODEL)
    batch["text"][::2, 5] = MODEL.text.eot_id
    batch["text"][::2, 6:] = 0
    return batch


def in_groups(batch, groups):
    grouped = group_captions(
        batch["text"], caption_lengths(batch["text"], MODEL.text.eot_id), groups
    )
    return {k: v for k, v in batch.items() if k != "text"} | grouped


@pytest.mark.parametrize(
    ("devices", "microbatch_size", "rows"),
    [
        (1, 8, (4, 4)),
        (8, 0, (1, 1)),
        pytest.param(1, 0, (8, 8), marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_the_plain_forms(devices, microbatch_size, rows):
    mesh = one_device_mesh() if devices == 1 else make_mesh(data=4, fsdp=2, tensor=1)
    groups = CaptionGroups((8, 24), rows)
    model = CLIP(MODEL)
    variables = init_variables(model, 0)
    features = make_features(model, mesh=mesh, preprocess=HALF, freeze="")
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
        for rows in (batch, in_groups(batch, groups))
    ]
    (want, _, want_grads), (got, _, got_grads) = results
    chex.assert_trees_all_close(got, want, rtol=1e-6)
    # Each weight's gradient is a sum over the tokens of 16 captions, here in another order: some
    # roundings of the largest term, 1.2e-7 of it each.
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(want_grads))
    chex.assert_trees_all_close(got_grads, want_grads, rtol=1e-5, atol=1e-6 * scale)


def test_no_row_travels_to_its_place():
    mesh = make_mesh(data=4, fsdp=2, tensor=1)
    sharding = jax.NamedSharding(mesh, jax.P(BATCH_AXES))
    z = jax.ShapeDtypeStruct((8, 6, 16), jnp.float32, sharding=sharding)
    place = jax.ShapeDtypeStruct((8, 6), jnp.int32, sharding=sharding)

    def there_and_back(z, place):
        y, back = jax.vjp(lambda z: put_in_order(z, place), z)
        return y, back(y)[0]

    program = jax.jit(there_and_back, out_shardings=sharding).lower(z, place).compile()
    assert not find_collectives(parse_program(program.as_text()), mesh.size)
    rng = np.random.default_rng(0)
    places = rng.permuted(np.tile(np.arange(6), (8, 1)), axis=1).astype(np.int32)
    values = rng.standard_normal(z.shape).astype(np.float32)
    y, dz = program(jax.device_put(values, sharding), jax.device_put(places, sharding))
    np.testing.assert_array_equal(y, np.take_along_axis(values, places[..., None], axis=1))
    np.testing.assert_array_equal(dz, values)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    text = dataclasses.replace(MODEL.text, context_length=16)
    monkeypatch.setitem(zoo.MODELS, "tiny", dataclasses.replace(MODEL, text=text))


def test_a_run_in_groups_resumes_to_the_bit(data, tmp_path, monkeypatch):
    """The lengths are counted once; a resumed run takes what the first has written down."""
    lengths = []

    class Placed(batch_feed.PlacedBatch):
        def __init__(self, arrays, keys, length, stop_signals):
            lengths.append(length)
            super().__init__(arrays, keys, length, stop_signals)

    monkeypatch.setattr(batch_feed, "PlacedBatch", Placed)
    monkeypatch.setattr(caption_shares, "may_group", lambda run: True)
    monkeypatch.setattr(caption_shares, "WORTH", 10.0)
    monkeypatch.setattr("clip_jax.data.caption_groups.GROUP_LENGTHS", (6, 8))
    monkeypatch.setattr("clip_jax.data.caption_groups.ROOM", 0.5)
    config = tiny_config(data, train__steps=4, train__batch_size=32, checkpoint__every=2)
    assert main.run(config, str(tmp_path / "whole")) == 0
    written = json.loads((tmp_path / "whole/config.json").read_text())["config"]["data"]
    shares = parse_shares(written["caption_groups"])
    assert list(shares) == [6, 8]
    groups = [length for length in lengths if isinstance(length, CaptionGroups)]
    assert groups and len(groups) < len(lengths)  # some batches did not fit
    assert all(length == 16 for length in lengths if not isinstance(length, CaptionGroups))

    parts = tmp_path / "parts"
    shutil.copytree(tmp_path / "whole", parts)
    shutil.rmtree(parts / "checkpoints/4")
    monkeypatch.setattr(caption_shares, "count_lengths", None)  # not called again
    assert main.run(config, str(parts)) == 0
    assert run_losses(parts) == run_losses(tmp_path / "whole")


def test_on_cpus_and_for_few_pairs_nothing_changes(data, tmp_path):
    config = tiny_config(data, train__batch_size=32)
    run = build_run(config, 3)
    assert not caption_shares.may_group(run) and run.caption_groups is None
    settled = caption_shares.with_caption_groups(run, None, tmp_path)
    assert settled.config.data.caption_groups == "off" and settled.caption_groups is None


def test_a_plan_takes_the_groups_of_the_config(data):
    config = tiny_config(data, train__batch_size=64, data__caption_groups="4:0.5")
    run = build_run(config, 3)
    rows = 64 // batch_shards(run.mesh)
    assert run.caption_groups.all_rows == rows and run.caption_groups.lengths[-1] == 16
    shapes = batch_of_run(run)
    assert "text" not in shapes and shapes["text_place"].shape == (64,)
    assert np.sum([shapes[f"text_{k}"].shape[0] for k in range(len(run.caption_groups.rows))]) == 64
