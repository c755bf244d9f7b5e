"""Kinds of captions by their weights and dropped words: by seed, epoch and sample alone."""

import collections
import itertools
import json

import numpy as np
import pytest
import webdataset
from data_cases import ToyTokenizer, encode, make_image, train_loader
from hypothesis import given
from hypothesis import strategies as st

from clip_jax.data.captions import (
    captions_of_kind,
    choose_caption,
    drop_words,
    parse_captions,
)
from clip_jax.data.order import WORDS_KEY, Uniforms
from clip_jax.data.sample_reader import SampleShape, caption_id
from clip_jax.data.shards import BadSampleError, Handles
from clip_jax.data.sources import open_shard
from clip_jax.errors import UserError


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """A shard whose samples have an original, two lines of another model, and a field."""
    path = tmp_path_factory.mktemp("kinds") / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for k in range(24):
            sample = {
                "__key__": f"{k:03d}",
                "png": encode(make_image("RGB", 12, 12, seed=k), "PNG"),
                "txt": f"original {k}",
                "json": json.dumps(
                    {"synthetic": f"made up {k}", "wrong": [f"no {k}", f"not {k}"] if k % 3 else []}
                ).encode(),
            }
            if k % 2:
                sample["blip.txt"] = f"first {k}\nsecond {k}\n"
            writer.write(sample)
    return str(path)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (("*",), "KEY=WEIGHT"),
        (("=1",), "KEY=WEIGHT"),
        (("a=0",), "KEY=WEIGHT"),
        (("a=nan",), "KEY=WEIGHT"),
        (("a=inf",), "KEY=WEIGHT"),
        ((".json=1",), 'endings on ".txt"'),
        (("..txt=1",), 'endings on ".txt"'),
        (("a=1", "a=2"), "'a' twice"),
    ],
)
def test_what_is_no_kind_is_named(items, message):
    with pytest.raises(UserError, match=message):
        parse_captions(items)
    assert parse_captions(("a=b=2",)) == (("a=b", 2.0),)


def test_each_kind_is_found_where_it_is(shard, tmp_path):
    def read(name, key, i=1):
        with Handles() as handles:
            return captions_of_kind(open_shard(name), key, i, handles)

    assert read(shard, "*") == read(shard, ".txt") == ["original 1"]
    assert read(shard, ".blip.txt") == ["first 1", "second 1"]
    assert read(shard, "synthetic") == ["made up 1"]
    assert read(f"{shard}#template=a {{}}|the {{}}", "synthetic") == [
        "a made up 1",
        "the made up 1",
    ]
    for key, i in ((".blip.txt", 0), ("caption", 0)):
        with pytest.raises(BadSampleError, match="no_caption"):
            read(shard, key, i)

    (tmp_path / "table.csv").write_text("filepath,title,recaption\na.png,old,new\n")
    assert read(str(tmp_path / "table.csv"), "*", 0) == ["old"]
    assert read(str(tmp_path / "table.csv"), "recaption", 0) == ["new"]
    with pytest.raises(BadSampleError, match="no files beside its images"):
        read(str(tmp_path / "table.csv"), ".txt", 0)
    (tmp_path / "lines.jsonl").write_text(
        '{"file_name": "a.png", "text": "t", "more": ["u", "v"]}\n'
    )
    assert read(str(tmp_path / "lines.jsonl"), "more", 0) == ["u", "v"]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"")
    (folder / "a.txt").write_text("beside")
    (folder / "a.gpt.txt").write_text("written")
    assert read(str(folder), ".gpt.txt", 0) == ["written"]


def test_kinds_are_taken_by_their_weights_and_an_absent_one_shares_out_its(shard):
    opened, kinds = open_shard(shard), parse_captions(("*=1", ".blip.txt=2", "synthetic=1"))
    with Handles() as handles:

        def counts(i):
            chances = (np.arange(4000) + 0.5) / 4000
            found = [choose_caption(opened, kinds, i, handles, chance) for chance in chances]
            return collections.Counter(found)

        assert counts(1) == {
            "original 1": 1000,
            "first 1": 1000,
            "second 1": 1000,
            "made up 1": 1000,
        }
        assert counts(0) == {"original 0": 2000, "made up 0": 2000}
        absent = parse_captions(("nothing=1",))
        with pytest.raises(BadSampleError, match="no_caption"):
            choose_caption(opened, absent, 0, handles, 0.5)


def take(shard, steps, **options):
    with train_loader([open_shard(shard)], streams=2, batch_size=12, **options) as loader:
        return list(itertools.islice(loader, steps))


KINDS = {"captions": ("*=1", ".blip.txt=1", "synthetic=2"), "word_dropout": 0.4}


def test_captions_are_the_same_from_any_step_and_move_no_crop(shard):
    whole = take(shard, 8, crop_scale=(0.3, 1.0), **KINDS)
    for batch, again in zip(
        whole[5:], take(shard, 3, start_step=5, crop_scale=(0.3, 1.0), **KINDS), strict=True
    ):
        for name in batch:
            np.testing.assert_array_equal(batch[name], again[name], err_msg=name)
    plain = take(shard, 8, crop_scale=(0.3, 1.0))
    assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(whole, plain, strict=True))
    # A pair of epochs gives a sample other kinds, and other words of one.
    epochs = [
        {k: t.tobytes() for b in part for k, t in zip(b["key"], b["text"], strict=True)}
        for part in (whole[:2], whole[2:4])
    ]
    assert sum(epochs[0][key] != epochs[1][key] for key in epochs[0]) > 12


def test_equal_captions_stay_equal_when_words_are_dropped(shard):
    shape = SampleShape(image_size=8, context_length=32)
    dropped = take(shard, 2, word_dropout=0.5, shape=shape)
    plain = take(shard, 2, shape=shape)
    for batch, other in zip(dropped, plain, strict=True):
        np.testing.assert_array_equal(batch["caption_id"], other["caption_id"])
        assert (batch["text"] != other["text"]).any()
    number = int(plain[0]["key"][0].rpartition("/")[2])
    assert plain[0]["caption_id"][0] == caption_id(f"original {number}")


def test_negatives_are_drawn_by_themselves_and_may_be_absent(shard):
    whole = take(shard, 6, negatives="wrong")
    plain = take(shard, 6)
    for batch, other in zip(whole, plain, strict=True):
        for name in other:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)
        for row, key in enumerate(batch["key"]):
            number = int(key.rpartition("/")[2])
            assert batch["negative_valid"][row] == bool(number % 3)
            texts = [f"no {number}", f"not {number}"] if number % 3 else [""]
            chosen = [
                text
                for text in texts
                if np.array_equal(ToyTokenizer()([text], 16)[0], batch["negative"][row])
            ]
            assert len(chosen) == 1
            assert batch["negative_id"][row] == (caption_id(chosen[0]) if number % 3 else 0)
    again = take(shard, 3, start_step=3, negatives="wrong", threads=2, processes=2)
    for batch, other in zip(whole[3:], again, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)
    drawn = {row.tobytes() for batch in whole for row in batch["negative"]}
    assert len(drawn) > 24  # both of some samples


@given(words=st.lists(st.text("abc", min_size=1), max_size=30), share=st.floats(0, 0.99))
def test_words_are_dropped_in_place_and_one_stays(words, share):
    rng = Uniforms(3, WORDS_KEY)
    rng.move(1, 2)
    kept = drop_words(" ".join(words), share, rng).split()
    assert len(kept) >= min(1, len(words))
    rest = iter(words)
    assert all(word in rest for word in kept)  # in their order
    if not share:
        assert kept == words


def test_about_the_share_of_words_is_dropped():
    rng = Uniforms(3, WORDS_KEY)
    rng.move(1, 2)
    assert 580 < len(drop_words("a " * 1000, 0.4, rng).split()) < 620
