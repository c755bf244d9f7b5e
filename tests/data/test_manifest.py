"""The file of counts, and runs that read a shard only when they come to it."""

import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import data_cases
import fsspec
import numpy as np
import pytest
from data_cases import train_loader
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data import dataset
from clip_jax.data.dataset import LazyShard, ShardCache, open_sources
from clip_jax.data.formats import remote
from clip_jax.data.formats.errors import ShardError
from clip_jax.data.manifest import ProcessShare, ShardEntry, entry_of, read_manifest, write_manifest
from clip_jax.data.skip_log import SkipLog
from clip_jax.data.sources import fingerprint, open_shards
from clip_jax.errors import UserError

ENTRIES = st.builds(
    ShardEntry,
    st.integers(0, 2**40),
    st.integers(0, 2**50),
    st.dictionaries(
        st.sampled_from(["no_image", "no_caption"]), st.tuples(st.integers(1, 99), st.text())
    ),
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(min_size=1), ENTRIES, max_size=5))
def test_what_is_written_is_read(tmp_path_factory, entries):
    folder = tmp_path_factory.mktemp("manifest")
    write_manifest(folder, entries)
    assert read_manifest(folder) == entries
    write_manifest("memory://bucket/x", entries)
    assert read_manifest("memory://bucket/x/") == entries
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_entries_of_read_shards(tmp_path):
    paths = data_cases.write_shards(tmp_path, [3, 2])
    entries = {
        Path(path).name: entry_of(s) for path, s in zip(paths, open_shards(paths), strict=True)
    }
    second = entries["s-00001.tar"]
    assert second[:3] == (2, Path(paths[1]).stat().st_size, {})
    assert second.digest != entries["s-00000.tar"].digest
    write_manifest(tmp_path, entries)
    lines = (tmp_path / "index.json").read_text().splitlines()
    assert len(lines) == 3 and json.loads("".join(lines))["shards"]["s-00000.tar"][0] == 3


def test_webdatasets_sizes_are_read_where_there_is_no_index(tmp_path):
    (tmp_path / "sizes.json").write_text(json.dumps({"a.tar": 3, "b.tar": "4"}))
    assert read_manifest(tmp_path) == {"a.tar": ShardEntry(3), "b.tar": ShardEntry(4)}
    write_manifest(tmp_path, {"a.tar": ShardEntry(5, 6)})
    assert read_manifest(tmp_path) == {"a.tar": ShardEntry(5, 6)}


@pytest.mark.parametrize("text", ["[]", "{", '{"a.tar": {"width": 3}}', '{"a.tar": -1}', "\xff"])
def test_other_files_of_that_name_are_no_sizes(tmp_path, text):
    (tmp_path / "sizes.json").write_text(text, encoding="latin-1")
    assert read_manifest(tmp_path) == {}


def test_damaged_and_foreign_indexes(tmp_path):
    path = tmp_path / "index.json"
    write_manifest(tmp_path, {"a.tar": ShardEntry(5, 6)})
    whole = path.read_text()
    for text in (whole[:-5], whole.replace("5", '"5"'), whole.replace("[5, 6]", "5")):
        path.write_text(text)
        with pytest.raises(UserError, match=r"index\.json is damaged"):
            read_manifest(tmp_path)
    path.write_text('{"weight_map": {}}')
    assert read_manifest(tmp_path) == {}
    with pytest.raises(UserError, match="another program's file"):
        write_manifest(tmp_path, {})
    assert path.read_text() == '{"weight_map": {}}'


def batches(shards, count=4, **changes):
    with train_loader(shards, **changes) as loader:
        return list(itertools.islice(loader, count)), dict(loader.skipped)


@pytest.fixture
def reads(monkeypatch):
    """Return the shards whose headers were read, in order."""
    read = []
    original = dataset.open_shard

    def spy(shard):
        read.append(Path(shard).name)
        return original(shard)

    monkeypatch.setattr(dataset, "open_shard", spy)
    return read


def names(count):
    return [f"s-{k:05d}.tar" for k in range(count)]


@pytest.mark.parametrize("cached_shards", [1, 3, 100])
def test_shards_read_when_needed_give_the_same_batches(tmp_path, cached_shards):
    data_cases.write_shards(tmp_path, [13, 9, 2, 16, 10])
    (eager,) = open_sources(str(tmp_path))
    (lazy,) = open_sources(str(tmp_path), log=SkipLog(), cached_shards=cached_shards)
    assert isinstance(lazy[0], LazyShard)
    assert fingerprint(lazy) == fingerprint(eager)
    want, _ = batches(eager)
    got, skipped = batches(lazy)
    assert not skipped
    for a, b in zip(want, got, strict=True):
        assert a["key"] == b["key"]
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["text"], b["text"])


def test_going_on_reads_the_shards_of_its_window_alone(tmp_path, reads):
    data_cases.write_shards(tmp_path, [4] * 40)
    run = str(tmp_path / "run")
    (first,) = open_sources(str(tmp_path), log=SkipLog(), workdir=run, cached_shards=16)
    assert sorted(reads) == names(40)
    reads.clear()
    (again,) = open_sources(str(tmp_path), log=SkipLog(), workdir=run, cached_shards=16)
    assert not reads and fingerprint(first) == fingerprint(again)
    batches(again, count=1, start_step=1000, threads=0)
    assert 4 <= len(set(reads)) == len(reads) <= 4 * 3  # a window of 2, or 3 cut pieces, a stream


def test_an_index_beside_remote_shards_spares_fetching_them(tmp_path, monkeypatch):
    paths = data_cases.write_shards(tmp_path, [4] * 6)
    fs = fsspec.filesystem("memory")
    for path in paths:
        fs.pipe_file(f"/set/{Path(path).name}", Path(path).read_bytes())
    fs.pipe_file("/set/sizes.json", json.dumps(dict.fromkeys(names(6), 4)).encode())
    fetched = []
    original = remote.fetch
    monkeypatch.setattr(remote, "fetch", lambda url, to: [fetched.append(url), original(url, to)])
    try:
        pattern = "memory://set/s-{00000..00005}.tar"
        (found,) = open_sources(pattern, log=SkipLog(), cached_shards=8)
        assert fingerprint(found) == fingerprint(open_shards(paths)) and not fetched
        got, skipped = batches(found, count=1, batch_size=4, threads=0)
        assert 1 <= len(fetched) <= 5 and not skipped
        want, _ = batches(open_shards(paths), count=1, batch_size=4)
        assert got[0]["key"] == want[0]["key"]
    finally:
        remote.CACHE.close()
        fs.rm("/set", recursive=True)


def test_a_shard_that_is_not_as_counted_loses_its_rows_and_moves_no_other(tmp_path):
    """One is missing, one damaged, one replaced by one with another count; the run is a second."""
    paths = [Path(p) for p in data_cases.write_shards(tmp_path, [8] * 6)]
    run = str(tmp_path / "run")
    pattern = f"{tmp_path}/s-{{00000..00005}}.tar"
    (whole,) = open_sources(pattern, log=SkipLog(), workdir=run, cached_shards=16)
    want, _ = batches(whole, count=3)
    paths[1].unlink()
    damaged = bytearray(paths[2].read_bytes())
    damaged[3] ^= 4  # in the first header
    paths[2].write_bytes(damaged)
    size = paths[4].stat().st_size
    data_cases.write_shards(tmp_path, [7], prefix="other")
    other = (tmp_path / "other-00000.tar").read_bytes()
    paths[4].write_bytes(other + bytes(size - len(other)))  # as long as before
    log = SkipLog(tmp_path / "skipped.jsonl")
    (found,) = open_sources(pattern, log=log, workdir=run, cached_shards=16)
    assert fingerprint(found) == fingerprint(whole)
    got, skipped = batches(found, count=3, log=log)  # 48 pairs: one epoch
    assert skipped == {"shard_missing": 8, "shard_damaged": 8, "shard_changed": 8}
    lost = {f"s-0000{k}.tar" for k in (1, 2, 4)}
    for a, b in zip(want, got, strict=True):
        for key, seen, valid in zip(a["key"], b["key"], b["valid"], strict=True):
            shard = key.partition("/")[0]
            assert seen.startswith(f"{shard}/#") if shard in lost else seen == key
            assert valid == (shard not in lost)
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert sorted(line["name"] for line in listed) == sorted(lost)


def test_a_file_of_another_size_is_counted_again(tmp_path, reads):
    paths = data_cases.write_shards(tmp_path, [4] * 3)
    run = str(tmp_path / "run")
    (before,) = open_sources(str(tmp_path), log=SkipLog(), workdir=run, cached_shards=4)
    data_cases.write_shards(tmp_path, [9])
    reads.clear()
    (after,) = open_sources(str(tmp_path), log=SkipLog(), workdir=run, cached_shards=4)
    assert reads == ["s-00000.tar"] and fingerprint(before) != fingerprint(after)
    assert [len(shard) for shard in after] == [9, 4, 4] and len(paths) == 3


def together(parts, call):
    """Run `call(share)` in as many threads, whose gather waits for all, as processes' does."""
    barrier, values_of = threading.Barrier(parts), {}

    def share(part):
        def gather(value):
            values_of[part] = json.loads(json.dumps(value))
            barrier.wait(20)
            values = [values_of[k] for k in range(parts)]
            barrier.wait(20)
            return values

        return ProcessShare(part, parts, gather)

    with ThreadPoolExecutor(parts) as pool:
        return list(pool.map(lambda part: call(share(part)), range(parts)))


def test_processes_share_the_counting_and_see_the_same_shards(tmp_path, reads):
    paths = data_cases.write_shards(tmp_path, [4, 5, 6, 7, 8])
    Path(paths[3]).write_bytes(b"no tar at all")
    run = str(tmp_path / "run")
    for expected in (names(5), ["s-00003.tar"]):  # the lost one is tried again at every start
        logs = [SkipLog(tmp_path / "run/skipped.jsonl", process=k) for k in range(3)]

        def opened(share, logs=logs):
            log = logs[share.index]
            return open_sources(str(tmp_path), log=log, cached_shards=8, workdir=run, share=share)[
                0
            ]

        found = together(3, opened)
        assert sorted(reads) == expected
        reads.clear()
        assert [[len(s) for s in shards] for shards in found] == [[4, 5, 6, 8]] * 3
        assert all(log.shard_counts == {"shard_damaged": 1} for log in logs)
    assert [p.name for p in (tmp_path / "run").glob("skipped*")] == ["skipped.jsonl"]


def test_processes_with_different_manifests_use_none(tmp_path, reads):
    """There is a copy of the data on each machine, and a manifest beside one of them."""
    for copy in "ab":
        (tmp_path / copy).mkdir()
        data_cases.write_shards(tmp_path / copy, [4, 5])
    write_manifest(tmp_path / "b", {"s-00000.tar": ShardEntry(4), "s-00001.tar": ShardEntry(6)})
    found = together(
        2,
        lambda share: open_sources(
            str(tmp_path / "ab"[share.index]), log=SkipLog(), cached_shards=8, share=share
        )[0],
    )
    assert [[len(s) for s in shards] for shards in found] == [[4, 5]] * 2
    # The first process had counted its part before it heard of the other's manifest.
    assert sorted(set(reads)) == names(2)


def test_one_thread_reads_a_shard_and_the_longest_unused_goes():
    read = []

    def slow(shard):
        time.sleep(0.02)
        read.append(shard)
        if shard == "bad":
            raise ShardError("shard_damaged", "shard bad is cut or damaged")
        return LazyShard(shard, ShardEntry(1), cached_shards)

    cached_shards = ShardCache(2, slow)
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(cached_shards.get, ["a"] * 8))) == 1
    for shard in ("b", "a", "c", "a", "b"):
        cached_shards.get(shard)
    assert read == ["a", "b", "c", "b"]
    assert {cached_shards.get("bad").cause for _ in range(3)} == {"shard_damaged"}
    assert read.count("bad") == 1
