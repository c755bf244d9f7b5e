"""The inspection of a set: its counts are those of what was written."""

import json

import numpy as np
import pytest
import webdataset
from data_cases import ToyTokenizer, encode, make_image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clip_jax.data import survey as survey_module
from clip_jax.data.loader import bucket_length
from clip_jax.data.survey import SurveyCounts, evenly_spaced, histogram, quantile
from clip_jax.errors import UserError
from clip_jax.tools import data_inspect as command
from clip_jax.tools.data_inspect import result_json, result_text

SIDES = ((40, 64), (200, 130), (90, 90))


def write(folder, count=90):
    """Two shards and a broken one: every tenth image is cut, three keys come twice."""
    rng = np.random.default_rng(0)
    lengths, shards = [], [folder / "0.tar", folder / "1.tar"]
    for shard, path in enumerate(shards):
        with webdataset.TarWriter(str(path)) as writer:
            for k in range(count // 2):
                number = shard * (count // 2) + k
                data = encode(make_image("RGB", *SIDES[number % 3], seed=number), "PNG")
                caption = "x" * int(rng.integers(1, 100))
                key = f"{number - 45 if 45 <= number < 48 else number:04d}"
                if number % 10 == 9:
                    data = data[:-30]
                else:
                    lengths.append(len(caption) + 1)  # and the end token
                sample = {"__key__": key, "png": data, "txt": caption, "cls": number % 4}
                writer.write(sample | {"json": {"width": SIDES[number % 3][0], "lang": "en"}})
    (folder / "2.tar").write_bytes(b"no tar" * 500)
    return f"{folder}/{{0..3}}.tar", lengths


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(command, "make_tokenizer", lambda name: ToyTokenizer())


def test_counts_are_exact(tmp_path, toy):
    source, lengths = write(tmp_path)
    out = tmp_path / "out"
    result = command.inspect([source], out=out, context_length=64, batch_size=8, threads=2)
    facts = json.loads(json.dumps(result_json(result)))
    assert facts["complete"] and facts["shards"] == 2 and facts["samples"] == 90
    assert [(s["cause"], s["name"][-5:]) for s in facts["bad_shards"]] == [
        ("shard_missing", "3.tar"),
        ("shard_damaged", "2.tar"),
    ]
    assert facts["looked_at"] == 90 and facts["bad"] == {"truncated": 9}
    assert facts["repeated_keys"] == 3
    assert facts["first_repeated_keys"] == ["1.tar/0000", "1.tar/0001", "1.tar/0002"]
    assert facts["captions"] == facts["pictures"] == facts["labelled"] == 81
    assert facts["tokens"]["low"] == min(lengths) and facts["tokens"]["high"] == max(lengths)
    assert facts["tokens"]["mean"] == pytest.approx(np.mean(lengths), rel=1e-12)
    assert facts["cut_captions"] == sum(n > 64 for n in lengths)
    # Each caption alone in a batch is trimmed to its bucket.
    rows = [np.array([[1] * (min(n, 64) - 1) + [99] + [0] * 64][0][:64], np.int32) for n in lengths]
    buckets = [bucket_length(row[None], 99) for row in rows]
    found = {b["tokens"]: b["captions"] for b in facts["buckets"]}
    assert found == {b: buckets.count(b) for b in (16, 24, 32, 48, 64)}
    assert facts["classes"] == 4 and facts["kinds"] == {"png RGB": 81}
    assert facts["short_side"]["low"] == 40 and facts["short_side"]["high"] == 130
    good = [k for k in range(90) if k % 10 != 9]
    sides = [min(SIDES[k % 3]) for k in good]
    assert facts["short_sides"]["64"] == sides.count(40)
    assert facts["short_sides"]["128"] == sides.count(90)
    assert facts["short_sides"]["224"] == sides.count(130)
    assert facts["fields"]["width"] == {"samples": 81, "low": 40, "high": 200}
    bad = [json.loads(line) for line in (out / "bad.jsonl").read_text().splitlines()]
    assert [line["name"] for line in bad[:2]] == ["0.tar/0009", "0.tar/0019"]
    assert json.loads((out / "inspect.json").read_text()) == facts
    with Image.open(out / "samples.png") as grid:
        assert grid.width > 1000 and grid.height > 800  # 24 images, six a line
    assert result.bad_samples[0][:2] == ("truncated", "0.tar/0009")
    text = result_text(result)
    assert "9 truncated" in text and "2.tar: shard_damaged" in text and "width in 100.0%" in text


def test_the_share_of_batches_is_what_trimmed_batches_have(tmp_path, toy):
    """Of many batches drawn from the captions, the share of each length, to 3 standard errors."""
    source, lengths = write(tmp_path)
    result = command.inspect([source], context_length=77, batch_size=4)
    rng = np.random.default_rng(1)
    longest = rng.choice(np.minimum(lengths, 77), (20_000, 4)).max(axis=1)
    low = 0
    for bucket in result.buckets:
        share = np.mean((longest > low) & (longest <= bucket.tokens))
        assert bucket.batches == pytest.approx(share, abs=3 * np.sqrt(0.25 / 20_000))
        low = bucket.tokens
    assert sum(bucket.batches for bucket in result.buckets) == pytest.approx(1.0, abs=1e-12)


def test_a_limit_looks_at_samples_from_everywhere(tmp_path, toy):
    source, _ = write(tmp_path)
    result = command.inspect([source], limit=30)
    assert result.samples == 90 and result.looked_at == 30
    assert evenly_spaced(90, 30).tolist() == list(range(0, 90, 3))
    assert evenly_spaced(5, 9).tolist() == list(range(5))


def test_after_an_interruption_the_figures_are_of_the_part_that_was_seen(
    tmp_path, toy, monkeypatch
):
    source, _ = write(tmp_path)
    monkeypatch.setattr(survey_module, "_ROWS_PER_PART", 10)

    class Bar:
        calls = 0

        def __init__(self, *args):
            pass

        def update(self, n):
            Bar.calls += 1
            if Bar.calls == 3:
                raise KeyboardInterrupt

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

    monkeypatch.setattr(command, "progress_bar", Bar)
    result = command.inspect([source], out=tmp_path / "out")
    assert not result.complete and result.looked_at == 30 and result.bad == {"truncated": 3}
    assert "30 were looked at before the interruption" in result_text(result)


def test_mistakes_are_one_line(tmp_path, toy):
    source, _ = write(tmp_path)
    for kwargs, text in (
        ({"limit": 0}, "--limit is 0"),
        ({"threads": 0}, "--threads is 0"),
        ({"where": "width>1000"}, "no sample meets --filter"),
    ):
        with pytest.raises(UserError, match=text):
            command.inspect([source], **kwargs)


def test_a_set_of_classes_and_one_of_nothing_good(tmp_path, toy):
    with webdataset.TarWriter(str(tmp_path / "c.tar")) as writer:
        for k in range(3):
            data = encode(make_image("L", 30, 30, seed=k), "JPEG")
            writer.write({"__key__": f"{k}", "jpg": data, "cls": k})
    result = command.inspect([str(tmp_path / "c.tar")], out=tmp_path / "out")
    assert result.captions == 0 and result.classes == 3 and result.kinds == {"jpg L": 3}
    assert "class numbers alone" in result_text(result)
    with webdataset.TarWriter(str(tmp_path / "d.tar")) as writer:
        writer.write({"__key__": "a", "jpg": b"GIF", "txt": "x"})
    result = command.inspect([str(tmp_path / "d.tar")], out=tmp_path / "none")
    assert result.bad == {"not_an_image": 1} and "1 not_an_image" in result_text(result)
    facts = result_json(result)
    assert facts["tokens"] == facts["short_side"] == {} and facts["pictures"] == 0
    assert not (tmp_path / "none" / "samples.png").exists()


COUNTS = st.lists(st.integers(0, 50), min_size=1, max_size=40)


@given(COUNTS, COUNTS, st.floats(0.01, 1.0))
def test_tallies_of_parts_add_up(first, second, share):
    parts = [SurveyCounts(samples=len(v)) for v in (first, second)]
    for counts, values in zip(parts, (first, second), strict=True):
        counts.tokens.update(values)
    whole = SurveyCounts()
    for part in parts:
        whole.add(part)
    values = sorted(first + second)
    assert whole.samples == len(values) == whole.tokens.total()
    value = quantile(whole.tokens, share)
    assert sum(v <= value for v in values) >= share * len(values)
    assert sum(v < value for v in values) < share * len(values)
    assert histogram(whole.tokens, (10, 20)) == [
        sum(v <= 10 for v in values),
        sum(10 < v <= 20 for v in values),
        sum(v > 20 for v in values),
    ]
