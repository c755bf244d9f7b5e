"""Batches: the same on any host count and any step, exact in what they skip, clean at the end."""

import io
import itertools
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections import Counter

import data_cases
import numpy as np
import pytest
from data_cases import ToyTokenizer, encode, eval_loader, make_image, train_loader
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data import sample_reader
from clip_jax.data.filters import FilteredShard
from clip_jax.data.loader import bucket_length, trim_to_bucket
from clip_jax.data.order import BatchPart
from clip_jax.data.sample_reader import caption_id
from clip_jax.data.shards import BadSampleError
from clip_jax.data.sources import open_shards
from clip_jax.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return open_shards(data_cases.write_shards(folder, [13, 9, 2, 16, 10], side=12))


def take(shards, count, **changes):
    with train_loader(shards, **({"seed": 11} | changes)) as loader:
        return list(itertools.islice(loader, count))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def test_shapes_types_and_contents(shards):
    batch = take(shards, 1)[0]
    assert set(batch) == {"image", "text", "caption_id", "valid", "key"}
    assert batch["image"].shape == (16, 8, 8, 3) and batch["image"].dtype == np.uint8
    assert batch["text"].shape == (16, 16) and batch["text"].dtype == np.int32
    assert batch["caption_id"].dtype == np.uint32 and batch["valid"].dtype == bool
    assert batch["valid"].all() and batch["image"].any(axis=(1, 2, 3)).all()
    for row, key in enumerate(batch["key"]):
        caption = f"caption {int(key.rpartition('/')[2])}"
        assert batch["caption_id"][row] == caption_id(caption)
        np.testing.assert_array_equal(batch["text"][row], ToyTokenizer()([caption], 16)[0])


def test_no_sample_is_lost_or_repeated_in_an_epoch(shards):
    # 50 samples in 2 streams of 25, 5 of each a batch: an epoch is 5 steps.
    batches = take(shards, 10, streams=2, batch_size=10)
    for epoch in (batches[:5], batches[5:]):
        assert Counter(key for batch in epoch for key in batch["key"]).most_common(1)[0][1] == 1
        assert sum(len(batch["key"]) for batch in epoch) == 50


def test_threads_cache_and_chunks_change_nothing(shards, monkeypatch):
    plain = take(shards, 9, threads=0)
    assert_same(take(shards, 9, threads=3), plain)
    assert_same(take(shards, 9, cache_bytes=1 << 20), plain)
    assert_same(take(shards, 9, cache_bytes=2000), plain)  # holds a few images only
    monkeypatch.setattr("clip_jax.data.loader.CHUNK_ROWS", 3)
    assert_same(take(shards, 9), plain)


def test_any_step_can_be_the_first(shards):
    whole = take(shards, 12)
    for step in (1, 5, 11):
        assert_same(take(shards, 12 - step, start_step=step), whole[step:])


def test_a_far_step_needs_no_walk_to_it(shards):
    """A walk of a million million steps would never end."""
    first = take(shards, 1, start_step=10**12)
    assert_same(take(shards, 2, start_step=10**12 - 1)[1:], first)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_hold_contiguous_rows_of_the_same_global_batch(shards, hosts):
    whole = take(shards, 5)
    parts = [take(shards, 5, part=BatchPart(h, hosts)) for h in range(hosts)]
    for step, batch in enumerate(whole):
        for name in ("image", "text", "caption_id", "valid", "key"):
            joined = np.concatenate([np.asarray(part[step][name]) for part in parts])
            np.testing.assert_array_equal(joined, np.asarray(batch[name]))


def test_crops_differ_between_epochs_and_seeds(shards):
    def images(**changes):
        batches = take(shards, 10, streams=2, batch_size=10, crop_scale=(0.3, 1.0), **changes)
        return [
            {
                k: image.tobytes()
                for b in part
                for k, image in zip(b["key"], b["image"], strict=True)
            }
            for part in (batches[:5], batches[5:])
        ]

    first, second = images()
    other, _ = images(seed=12)
    for again in (second, other):
        assert again.keys() == first.keys()
        assert sum(again[key] != first[key] for key in first) > 40


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return open_shards([str(path)])


GOOD = encode(make_image("RGB", 12, 10), "PNG")
BAD = {
    "not_an_image": [("png", b"\0\0\0 ftypavif"), ("txt", b"x")],
    "truncated": [("png", GOOD[: len(GOOD) // 2]), ("txt", b"x")],
    "empty": [("jpg", b""), ("txt", b"x")],
    "no_image": [("txt", b"x")],
    "no_caption": [("png", GOOD), ("json", b'{"caption": null}')],
    "empty_caption": [("png", GOOD), ("txt", b" \n\t\r\n")],
    "caption_not_utf8": [("png", GOOD), ("txt", b"caf\xe9")],
    "caption_not_json": [("png", GOOD), ("json", b"{")],
    "caption_too_long": [("png", GOOD), ("txt", b"x" * ((1 << 20) + 1))],
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Return good samples with one of every bad kind among them, and two of odd but good kinds."""
    members = []
    for k, (cause, sample) in enumerate(BAD.items()):
        members += [(f"g{k}.png", GOOD), (f"g{k}.txt", b"good"), (f"g{k}.url", b"http://x")]
        members += [(f"{cause}.{suffix}", data) for suffix, data in sample]
    members += [("half.png", GOOD), ("half.json", b'{"caption": "\\ud800"}')]
    members += [("json.png", GOOD), ("json.json", b'{"caption": "from json", "x": 1}')]
    members += [("bom.png", GOOD), ("bom.txt", "line \u00e9\n\n second \r\n".encode())]
    return write_tar(tmp_path_factory.mktemp("mixed") / "m.tar", members)


def test_bad_samples_keep_their_row_and_are_counted_exactly(mixed):
    total = len(mixed[0])
    assert total == 2 * len(BAD) + 3
    expected = Counter(BAD.keys())
    expected["caption_not_utf8"] += 1  # half a surrogate pair, out of the JSON
    with train_loader(mixed, streams=1, batch_size=total) as loader:
        for epoch in range(1, 4):
            batch = next(loader)
            assert loader.skipped == Counter({c: n * epoch for c, n in expected.items()})
            bad = {
                key for key, valid in zip(batch["key"], batch["valid"], strict=True) if not valid
            }
            assert bad == {f"m.tar/{cause}" for cause in BAD} | {"m.tar/half"}
            assert not batch["image"][~batch["valid"]].any()
            assert not batch["caption_id"][~batch["valid"]].any()
            assert (batch["text"][~batch["valid"]] == ToyTokenizer()([""], 16)).all()
        assert any("truncated" in line and "m.tar/truncated" in line for line in loader.recent)


def test_of_several_lines_one_is_chosen_by_chance_and_again_the_same(mixed):
    changes = {"streams": 1, "batch_size": len(mixed[0])}
    batches = take(mixed, 24, **changes)
    seen = {int(batch["caption_id"][batch["key"].index("m.tar/bom")]) for batch in batches}
    assert seen == {caption_id("line é"), caption_id("second")}
    assert_same(take(mixed, 3, start_step=21, **changes), batches[21:])


def test_a_shard_that_changes_under_the_run_is_counted(tmp_path):
    shards = write_tar(tmp_path / "x.tar", [("a.png", GOOD), ("a.txt", b"x")])
    with train_loader(shards, streams=1, batch_size=1, threads=0) as loader:
        assert next(loader)["valid"].all()
        with open(shards[0].path, "ab") as file:
            file.write(b"more")
        assert not next(loader)["valid"].any()
        os.remove(shards[0].path)
        assert not next(loader)["valid"].any()
        assert loader.skipped == {"shard_changed": 1, "read_failed": 1}


def test_no_row_leaves_a_file_open(mixed):
    before = len(os.listdir("/proc/self/fd"))
    take(mixed, 3, streams=1, threads=0)
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("batch_size, hosts", [(7, 1), (50, 1), (64, 2), (12, 4)])
def test_evaluation_sees_every_sample_once_in_order(shards, batch_size, hosts):
    per_host = []
    for host in range(hosts):
        part = BatchPart(host, hosts)
        with eval_loader(shards, batch_size=batch_size, part=part, threads=2) as loader:
            batches = list(loader)
            assert len(batches) == loader.num_steps == -(-50 // batch_size)
            assert not loader.skipped
        assert all(len(batch["key"]) == batch_size // hosts for batch in batches)
        per_host.append(batches)
    keys, labels, captions = [], [], []
    for step in zip(*per_host, strict=True):
        for batch in step:
            rows = np.flatnonzero(batch["valid"])
            keys += [batch["key"][row] for row in rows]
            labels += batch["label"][rows].tolist()
            captions += [batch["captions"][row] for row in rows]
            assert (batch["label"][~batch["valid"]] == -1).all()
    assert [int(key.rpartition("/")[2]) for key in keys] == list(range(50))
    assert labels == [k % 7 for k in range(50)]
    assert captions == [[f"caption {k}"] for k in range(50)]


def test_evaluation_needs_no_caption_where_there_is_a_label(tmp_path):
    members = [("a.png", GOOD), ("a.cls", b"3\n"), ("b.png", GOOD), ("c.png", GOOD)]
    members += [("c.cls", b"many"), ("d.png", GOOD), ("d.txt", b"one\ntwo"), ("e.cls", b"1")]
    shards = write_tar(tmp_path / "x.tar", members)
    with eval_loader(shards, batch_size=8) as loader:
        batch = next(loader)
        assert batch["valid"].tolist() == [True, False, False, True, False] + [False] * 3
        assert batch["label"].tolist() == [3, -1, -1, -1, -1, -1, -1, -1]
        assert batch["captions"][3] == ["one", "two"]
        assert batch["caption_id"][3] == caption_id("one")
        assert loader.skipped == {"no_caption": 2, "no_image": 1}


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"batch_size": 18}, r"config\.train\.batch_size is 18, .* set it to 16"),
        ({"part": BatchPart(0, 3)}, r"config\.data\.streams is 4, .* set it to 6"),
        ({"streams": 64, "batch_size": 64}, r"config\.data\.streams to at most 50"),
    ],
)
def test_impossible_numbers(shards, changes, text):
    with pytest.raises(UserError, match=text):
        train_loader(shards, **changes)


def test_a_fault_of_our_own_is_not_counted_away(shards):
    class Broken(ToyTokenizer):
        def __call__(self, texts, context_length=77):
            raise KeyError("tokenizer")

    loader = train_loader(shards, tokenizer=Broken())
    with loader, pytest.raises(KeyError, match="tokenizer"):
        next(loader)


class BrokenShard(FilteredShard):
    """A shard whose captions raise an error."""

    def __init__(self, shard, error):
        super().__init__(shard)
        self.error = error

    def captions(self, i, handles):
        raise self.error


@pytest.mark.parametrize("error", [TypeError, AttributeError, NameError])
def test_a_programming_error_in_a_reader_is_no_bad_sample(shards, error):
    loader = train_loader([BrokenShard(shards[0], error("ours"))])
    with loader, pytest.raises(error, match="ours"):
        next(loader)


@pytest.mark.parametrize(
    "error, cause",
    [
        (BadSampleError("no_caption"), "no_caption"),
        (OSError("the disk"), "read_failed"),
        (ValueError("a library's"), "broken"),
    ],
)
def test_a_fault_of_the_data_is_a_bad_sample(shards, error, cause):
    with train_loader([BrokenShard(shards[0], error)]) as loader:
        assert not next(loader)["valid"].any()
        assert loader.skipped == {cause: 16}


def test_closing_ends_the_threads(shards):
    others = set(threading.enumerate())
    with train_loader(shards) as loader:
        next(loader)
        assert set(threading.enumerate()) - others
    # One that is being started is among them, and cannot be waited for yet.
    threads = [thread for thread in set(threading.enumerate()) - others if thread.ident is not None]
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_an_interrupted_program_ends_at_once_and_quietly(shards):
    """With many batches in the queue, which Python would otherwise finish before it ends."""
    code = f"""
import sys
sys.path[:0] = {[os.path.dirname(data_cases.__file__), os.getcwd()]!r}
from data_cases import train_loader
from clip_jax.data import loader
from clip_jax.data.sources import open_shards
loader.PREFETCH_BATCHES = 5000
shards = open_shards({[shard.path for shard in shards]!r})
with train_loader(shards, batch_size=400, window=8) as batches:
    next(batches)
    raise KeyboardInterrupt
"""
    # Decoding the whole queue would take minutes: it would run into the limit.
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr.strip().endswith("KeyboardInterrupt") and done.stderr.count("Error") == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=6), st.sampled_from([16, 20, 64, 77]))
def test_trimming_keeps_every_end_token_in_the_smallest_bucket(lengths, context):
    text = ToyTokenizer()(["a" * n for n in lengths], context)
    out = trim_to_bucket(text, ToyTokenizer.eot_id)
    longest = min(max(lengths) + 1, context)
    assert out.shape[1] == min([b for b in (16, 24, 32, 48, 64, 77) if b >= longest] + [context])
    np.testing.assert_array_equal(out, text[:, : out.shape[1]])
    assert not text[:, out.shape[1] :].any()


def test_a_row_without_an_end_token_is_not_cut():
    text = np.ones((2, 77), np.int32)
    text[0, 3] = 99
    assert bucket_length(text, 99) == 77
    assert bucket_length(text[:1], 99) == 16


def test_the_cache_respects_its_bound():
    cache = sample_reader._ImageCache(1000)
    for k in range(5):
        cache.put(k, make_image("RGB", 10, 10))
    assert [cache.get(k) is not None for k in range(5)] == [True, True, False, False, False]
