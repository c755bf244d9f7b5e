"""Filtering by a model's own scores: exact, gone on with after a kill, and trained on."""

import dataclasses

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import run_tiny
import webdataset
from data_cases import ToyTokenizer, encode, make_image
from hypothesis import given
from hypothesis import strategies as st
from pairs import write_data
from tiny import VIT

from clip_jax import api
from clip_jax.data.dataset import open_sources
from clip_jax.data.images import decode_image, eval_transform
from clip_jax.data.shards import Handles
from clip_jax.data.writing.scores import part_path, read_part, select, write_part
from clip_jax.errors import UserError
from clip_jax.evaluation.encoders import Encoders
from clip_jax.models.clip import CLIP, init_variables
from clip_jax.pretrained.trees import from_variables
from clip_jax.pretrained.work_folder import RunDescription, write_work_folder
from clip_jax.tokenizers import make_tokenizer, tokenizer_spec
from clip_jax.tools import data_filter as command

SIDE, COUNT = 12, 50
_RNG = np.random.default_rng(0)
PIXELS, WORDS = _RNG.normal(size=(SIDE * SIDE * 3, 8)), _RNG.normal(size=(100, 8))
ENCODED = []


def encode_image(images):
    ENCODED.append(len(images))
    return (np.asarray(images).reshape(len(images), -1) / 255.0 - 0.5) @ PIXELS


def encode_text(tokens):
    return (WORDS[tokens] * (tokens > 0)[..., None]).sum(axis=1)


TOY = Encoders(
    encode_image,
    encode_text,
    ToyTokenizer(),
    image_size=SIDE,
    context_length=32,
    embed_dim=PIXELS.shape[1],
    scale=100.0,
    identity="toy",
)


def write(folder):
    """50 samples in two shards; 0, 10, ... cannot be read, 5, 15, ... have three captions."""
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"{shard}.tar")) as writer:
            for k in range(shard * 25, shard * 25 + 25):
                data = encode(make_image("RGB", 30, 24, seed=k), "PNG")
                text = "\n".join(f"words {k * 7 + n}" for n in range(3 if k % 10 == 5 else 1))
                sample = {"__key__": f"{k:04d}", "png": data[:-20] if k % 10 == 0 else data}
                writer.write(sample | {"txt": text, "json": {"uid": f"u{k}"}})
    return f"{folder}/{{0..1}}.tar"


def expected_scores():
    """One pair after the other, in float64."""
    found = np.full(COUNT, np.nan)
    for k in range(COUNT):
        if k % 10:
            image = decode_image(encode(make_image("RGB", 30, 24, seed=k), "PNG"))
            z_image = encode_image(eval_transform(image, SIDE)[None])[0]
            texts = [f"words {k * 7 + n}" for n in range(3 if k % 10 == 5 else 1)]
            cosines = []
            for z_text in encode_text(ToyTokenizer()(texts, 32)):
                lengths = np.linalg.norm(z_image) * np.linalg.norm(z_text)
                cosines.append(z_image @ z_text / lengths)
            found[k] = np.mean(cosines)
    return found


def read_set(folder, where=""):
    """uid -> similarity of every sample of a source."""
    (shards,) = open_sources(str(folder), where=where)
    with Handles() as handles:
        records = [shard.record(i, handles) for shard in shards for i in range(len(shard))]
    return {record["uid"]: record["similarity"] for record in records}


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_scores_are_the_cosines_and_select_what_they_say(tmp_path):
    source, out = write(tmp_path), tmp_path / "out"
    result = command.filter_set([source], out, TOY, threshold=-0.2, batch_size=16)
    text = command.result_text(result)
    assert "45 of 50 pairs scored" in text and "not scored: 5 truncated" in text
    table = pq.read_table(str(out / "scores" / "part-00000.parquet"))
    assert table.column("key").to_pylist()[24:26] == ["0.tar/0024", "1.tar/0025"]
    scores = table.column("similarity").to_numpy().astype(np.float64)
    # float32 features of 8 numbers: a few units of 6e-8.
    np.testing.assert_allclose(scores, expected_scores(), atol=1e-6)
    wanted = {f"u{k}": scores[k] for k in range(COUNT) if scores[k] >= -0.2}
    assert 5 < len(wanted) < 40 and result.written.samples == len(wanted) == len(result.rows)
    np.testing.assert_array_equal(result.scores_B, scores.astype(np.float32))
    assert read_set(out / "similarity--0.2") == wanted
    # The half with the highest scores, and all of them for the config's own filter.
    command.filter_set([source], out, TOY, top=0.5, batch_size=16)
    best = sorted((s for s in scores if s == s), reverse=True)[:22]
    assert sorted(read_set(out / "top-0.5").values(), reverse=True) == best
    command.filter_set([source], out, TOY, batch_size=16, per_shard=20)
    assert read_set(out / "all", "similarity>=-0.2") == wanted
    assert len(read_set(out / "all")) == 45


def test_interrupted_it_goes_on_at_its_part_with_the_same_bytes(tmp_path, monkeypatch):
    source = write(tmp_path)
    monkeypatch.setattr(command, "PART_ROWS", 8)
    settings = {"top": 0.5, "batch_size": 8, "per_shard": 10}
    whole = command.filter_set([source], tmp_path / "whole", TOY, **settings)

    def stopping(images):
        if len(ENCODED) == 3:
            raise KeyboardInterrupt
        return encode_image(images)

    out = tmp_path / "out"
    ENCODED.clear()
    with pytest.raises(KeyboardInterrupt):
        command.filter_set(
            [source], out, dataclasses.replace(TOY, encode_image=stopping), **settings
        )
    assert sorted(p.name for p in (out / "scores").glob("part-*")) == [
        f"part-{n:05d}.parquet" for n in range(3)
    ]
    ENCODED.clear()
    again = command.filter_set([source], out, TOY, **settings)
    assert len(ENCODED) == 4  # of seven batches three were stored
    assert contents(out) == contents(tmp_path / "whole")
    assert again.skipped == whole.skipped
    assert command.result_text(again) == command.result_text(whole).replace("/whole/", "/out/")
    # Another choice encodes nothing.
    ENCODED.clear()
    command.filter_set([source], out, TOY, threshold=0.0, batch_size=8)
    assert not ENCODED


def test_scores_of_another_model_or_other_data_are_not_mixed(tmp_path):
    source, out = write(tmp_path), str(tmp_path / "out")
    command.filter_set([source], out, TOY, scores_only=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["scores"]
    other = dataclasses.replace(TOY, identity="other")
    with pytest.raises(UserError, match=r"another model \(toy, now other\)"):
        command.filter_set([source], out, other)
    with pytest.raises(UserError, match="another data"):
        command.filter_set([source.replace("..1", "..0")], out, TOY)
    part_path(tmp_path / "out" / "scores", 0).write_bytes(b"PAR1")
    with pytest.raises(UserError, match="damaged"):
        command.filter_set([source], out, TOY)
    with pytest.raises(UserError, match="leaves none of the 45 scored"):
        command.filter_set([source], tmp_path / "none", TOY, threshold=1.0)


SCORES = st.lists(st.one_of(st.just(np.nan), st.sampled_from([0.1, 0.2, 0.2001, 0.3])), min_size=1)


@given(SCORES, st.floats(0.01, 1.0), st.sampled_from([None, 0.1, 0.2, 0.25]))
def test_what_is_selected(values, top, threshold):
    scores = np.array(values, np.float32)
    scored = int((~np.isnan(scores)).sum())
    try:
        rows = select(scores, top=top, threshold=threshold)
    except UserError:
        low = -1 if threshold is None else threshold
        assert int(top * scored) == 0 or not (np.sort(scores)[:scored] >= low).any()
        return
    assert rows.tolist() == sorted(set(rows.tolist())) and len(rows) <= int(top * scored)
    assert not np.isnan(scores[rows]).any()
    if threshold is None:
        assert len(rows) == int(top * scored)
        left = np.setdiff1d(np.flatnonzero(~np.isnan(scores)), rows)
        assert not len(left) or scores[left].max() <= scores[rows].min()
    else:
        assert (scores[rows].astype(np.float64) >= threshold).all()


def test_parts_keep_every_bit(tmp_path):
    scores = np.array([0.1, np.nan, -1.0, 1 / 3], np.float32)
    write_part(tmp_path / "p", ["a", "b", "c", "\udc80"], scores, command.Counter(truncated=1))
    found, skipped = read_part(tmp_path / "p")
    np.testing.assert_array_equal(found, scores)
    assert skipped == {"truncated": 1}


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--threshold", "2"], "--threshold is 2"),
        (["--top", "0"], "--top is 0"),
        (["--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_mistakes_are_one_line(flags, text):
    with pytest.raises(UserError, match=text):
        command.check(command.parse(["x.tar", "--model", "m", "--out", "o", *flags]))


def test_a_checkpoint_scores_as_its_own_encoders_do(tmp_path):
    """A tiny model on eight devices, its captions trimmed, against the public functions."""
    folder, pattern = write_data(tmp_path / "data", shards=1, samples=10)
    spec = tokenizer_spec(str(folder / "t.model"))
    tokenizer = make_tokenizer(spec)
    text = dataclasses.replace(
        VIT.text, vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id, context_length=32
    )
    text, vision = (dataclasses.replace(tower, layers=1) for tower in (text, VIT.vision))
    config = dataclasses.replace(VIT, vision=vision, text=text)
    variables = jax.jit(lambda: init_variables(CLIP(config), 0))()
    (tmp_path / "model").mkdir()
    arrays = from_variables(variables["params"], {})
    write_work_folder(tmp_path / "model", RunDescription("tiny", config, spec), arrays)
    encoders = api.load_encoders(str(tmp_path / "model"))
    out = tmp_path / "out"
    command.filter_set([pattern], out, encoders, scores_only=True, batch_size=8)
    found, _ = read_part(part_path(out / "scores", 0))
    clip = api.load(str(tmp_path / "model"))
    ((shard,),) = open_sources(pattern)
    with Handles() as handles:
        images = [decode_image(shard.image(i, handles)) for i in range(10)]
        captions = [shard.captions(i, handles)[0] for i in range(10)]
    z_image = np.asarray(clip.encode_image(clip.preprocess(images)))
    z_text = np.asarray(clip.encode_text(clip.tokenize(captions)))
    # Trimming and eight devices change the order of float32 sums: measured 2.9e-7.
    np.testing.assert_allclose(found, (z_image * z_text).sum(axis=1), atol=2e-6)


@pytest.mark.slow
def test_a_run_trains_on_what_its_model_kept(tmp_path):
    """Through the commands: train, filter with that run, train on what was kept, both ways."""
    experiment = run_tiny.write_experiment(tmp_path / "data", shards=2, samples=64)
    steps = ("--config.train.epochs=1", "--config.data.repeat=False")
    done = run_tiny.run_one(experiment, tmp_path / "run", *steps, devices=2)
    assert done.returncode == 0, done.stderr
    source = str(tmp_path / "data" / "{00000..00001}.tar")
    line = [source, "--model", str(tmp_path / "run"), "--out", str(tmp_path / "f")]
    for flags, kept in ((["--top", "0.5"], "kept 50.0%: 64 pairs"), ([], "kept 100.0%: 128 pairs")):
        done = run_tiny.run_module("clip_jax.data.filter", *line, *flags, devices=2)
        assert kept in done.stdout, done.stderr
    least = min(similarities(tmp_path / "f" / "top-0.5"))
    where = f"--config.data.filter=similarity>={least!r}"
    for name, data in (("shards", ["top-0.5"]), ("field", ["all", where])):
        line = [f"--config.data.train={tmp_path}/f/{data[0]}", *data[1:], *steps]
        done = run_tiny.run_one(experiment, tmp_path / name, *line, devices=2)
        assert done.returncode == 0, done.stderr
        assert "step 4/4" in done.stdout  # one pass of 64 pairs in batches of 16


def similarities(folder):
    (shards,) = open_sources(str(folder))
    with Handles() as handles:
        return [s.record(i, handles)["similarity"] for s in shards for i in range(len(s))]
