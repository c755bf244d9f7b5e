"""Patterns, indexing, and that a damaged shard never shortens silently."""

import gzip
import io
import json
import os
import random
import shutil
import tarfile

import data_cases
import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_iterator

from clip_jax.data import sources
from clip_jax.data.formats import webdataset as reader
from clip_jax.errors import UserError


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return data_cases.write_shards(tmp_path_factory.mktemp("shards"), [7, 1, 12])


def read(shard, place):
    with open(shard.path, "rb") as file:
        file.seek(place[0])
        return file.read(place[1])


def test_patterns_name_the_same_shards(paths):
    folder = os.path.dirname(paths[0])
    for pattern in (
        f"{folder}/s-{{00000..00002}}.tar",
        f"{folder}/s-*.tar",
        folder,
        "::".join(paths),
        f"{folder}/s-0000{{0,1,2}}.tar",
        f"{folder}/s-{{00000..00001}}.tar::{paths[2]}",
    ):
        assert sources.expand(pattern) == paths


def test_braces():
    assert sources.expand_braces("a{8..11}") == ["a8", "a9", "a10", "a11"]
    assert sources.expand_braces("a{08..10}b") == ["a08b", "a09b", "a10b"]
    assert sources.expand_braces("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]


@pytest.mark.parametrize(
    "pattern, text",
    [
        ("{folder}/s-{{00000..00009}}.tar", r"s-00003.tar and 6 more are missing \(3 found\)"),
        ("{folder}/x*.tar", "no file .*x"),
        ("{folder}/empty", "holds no .tar file"),
        ("{folder}/s-00000.tar::{folder}/s-00000.tar", "twice"),
        ("{folder}/z.tar.gz", "compressed archive does not allow"),
        ("{folder}/s-{{3..1}}.tar", "runs backwards"),
        ("{folder}/s-{{abc}}.tar", "neither a range"),
        ("pipe:cat x.tar", "a pipe or an unknown address"),
        ("{folder}/s-00000.txt", "no file"),
        ("{folder}/s-00000.tar#color=x", "option 'color' is not among"),
        ("{folder}/s-00000.tar#template=no braces", "needs a {}"),
        ("::a.tar", "empty part"),
    ],
)
def test_patterns_that_cannot_be_meant(paths, pattern, text):
    folder = os.path.dirname(paths[0])
    os.makedirs(f"{folder}/empty", exist_ok=True)
    with open(f"{folder}/z.tar.gz", "wb") as file:
        file.write(gzip.compress(b"x"))
    with pytest.raises(UserError, match=text):
        sources.expand(pattern.format(folder=folder))


def test_a_shard_finds_what_webdataset_finds(paths):
    shards = sources.open_shards(paths)
    assert [len(shard) for shard in shards] == [7, 1, 12]
    for shard in shards:
        with open(shard.path, "rb") as file:
            members = [m | {"__url__": shard.path} for m in tar_file_iterator(file)]
        samples = list(group_by_keys(members))
        assert len(samples) == len(shard)
        for i, sample in enumerate(samples):
            assert sample["__key__"] == shard.key(i)
            assert sample["png"] == read(shard, shard.member(i, "png"))
            for suffix in ("txt", "cls", "json"):
                assert sample[suffix] == read(shard, shard.member(i, suffix))


def test_sharded_writer_and_compound_names(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "w-%03d.tar"), maxcount=2, verbose=0) as writer:
        for k in range(5):
            writer.write({"__key__": f"dir.v1/{k}", "JPG": b"x", "seg.png": b"y", "txt": "t"})
    shards = sources.open_shards(sources.expand(str(tmp_path)))
    assert [len(shard) for shard in shards] == [2, 2, 1]
    assert shards[0].key(1) == "dir.v1/1"
    assert read(shards[0], shards[0].member(1, "jpg")) == b"x"
    assert shards[0].ignored == 2  # `seg.png` is another suffix than `png`


def tar_of(path, names, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 5
            tar.addfile(member, io.BytesIO(b"12345"))
    return str(path)


def test_incomplete_samples_keep_their_place_and_are_named(tmp_path):
    names = ["a.jpg", "a.txt", "b.txt", "c.png", ".hidden", "README", "d.bin", "e.webp", "e.json"]
    shard = reader.open_shard(tar_of(tmp_path / "x.tar", names))
    assert [shard.key(i) for i in range(len(shard))] == ["a", "b", "c", "d", "e"]
    assert shard.ignored == 3
    assert shard.incomplete() == {"no_image": ["b", "d"], "no_caption": ["c", "d"]}


def test_a_key_that_comes_back_is_a_new_sample(tmp_path):
    shard = reader.open_shard(tar_of(tmp_path / "x.tar", ["a.jpg", "a.txt", "a.jpg", "a.txt"]))
    assert len(shard) == 2


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names(tmp_path, form):
    names = ["d" * 90 + "/" + "k" * 60 + ".jpg", "é/日本.jpg"]
    shard = reader.open_shard(tar_of(tmp_path / "x.tar", names, format=form))
    assert [shard.key(i) for i in range(2)] == [name.removesuffix(".jpg") for name in names]


@given(st.text(st.sampled_from("ab./"), max_size=12))
def test_split_name(name):
    key, suffix = reader.split_name(name)
    if key:
        assert (key + "." + suffix).lower() == name.lower()
        assert "." not in key.rpartition("/")[2]


@pytest.fixture(scope="module")
def plain(paths):
    """Return one shard's bytes, and the shard."""
    with open(paths[2], "rb") as file:
        return file.read(), reader.open_shard(paths[2])


def open_bytes(folder, data):
    path = folder / "x.tar"
    path.write_bytes(data)
    return reader.open_shard(str(path))


def same(shard, other):
    return shard.digest() == other.digest()


def test_every_flipped_header_bit_is_noticed_or_harmless(tmp_path, plain):
    """A flip in a header changes its checksum; one in the data moves no member."""
    data, whole = plain
    rng = random.Random(0)
    for _ in range(150):
        block = rng.randrange(0, whole.size // 512)
        at = 512 * block + rng.randrange(512)
        mutant = bytearray(data)
        mutant[at] ^= 1 << rng.randrange(8)
        try:
            shard = open_bytes(tmp_path, mutant)
        except UserError as e:
            assert "cut or damaged at byte" in str(e)
        else:
            assert same(shard, whole)


def test_a_header_flip_in_every_header_is_an_error(tmp_path, plain):
    data, _ = plain
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        headers = [member.offset for member in tar.getmembers()]
    for offset in headers:
        mutant = bytearray(data)
        mutant[offset + 3] ^= 4
        with pytest.raises(UserError, match=f"damaged at byte {offset}"):
            open_bytes(tmp_path, mutant)


def test_every_cut_is_an_error(tmp_path, plain):
    data, _ = plain
    end = len(data.rstrip(b"\0"))
    rng = random.Random(1)
    for size in [0, 1, 511, 512, 513, end, end + 100, *(rng.randrange(end) for _ in range(80))]:
        with pytest.raises(UserError, match="damaged at byte"):
            open_bytes(tmp_path, data[:size])


def test_zeros_in_the_middle_garbage_behind_and_unwritten_tails(tmp_path, plain):
    data, whole = plain
    middle = whole.member(5, "png")[0] - 512
    for bad in (
        data[:middle] + bytes(2048) + data[middle + 2048 :],
        data + b"more",
        data + data,
        data + bytes(2 << 20),
        data[:middle] + bytes(3 << 20),
    ):
        with pytest.raises(UserError, match="damaged at byte"):
            open_bytes(tmp_path, bad)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_bytes_raise_anything_else(tmp_path_factory, plain, data):
    raw = bytearray(plain[0][:8192]) + bytes(1024)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(raw) - 9))
        raw[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        open_bytes(folder, raw)
    except UserError:
        pass
    finally:
        shutil.rmtree(folder)


def test_compressed_and_missing_shards(tmp_path, plain):
    with pytest.raises(UserError, match="compressed with gzip"):
        open_bytes(tmp_path, gzip.compress(plain[0]))
    with pytest.raises(UserError, match="cannot be read: No such file"):
        reader.open_shard(str(tmp_path / "nowhere.tar"))


def test_side_files_hold_the_shard_to_its_count(tmp_path, plain):
    data, _ = plain
    shard = open_bytes(tmp_path, data)
    side = tmp_path / "x.tar.index.json"
    reader.write_side_file(shard)
    assert same(reader.open_shard(shard.path), shard)

    record = json.loads(side.read_text())
    side.write_text(json.dumps(record | {"samples": 13}))
    with pytest.raises(UserError, match="samples 12, and its side file says 13"):
        reader.open_shard(shard.path)
    side.write_text(json.dumps(record | {"members": "0"}))
    with pytest.raises(UserError, match="members"):
        reader.open_shard(shard.path)
    side.write_text("[]")
    with pytest.raises(UserError, match="is damaged"):
        reader.open_shard(shard.path)


def test_fingerprint_tells_data_sets_apart(paths):
    shards = sources.open_shards(paths)
    whole = sources.fingerprint(shards)
    assert whole == sources.fingerprint(sources.open_shards(paths))
    assert whole != sources.fingerprint(shards[:2]) != sources.fingerprint(shards[1:])


def test_the_table_of_members_is_lean(tmp_path):
    names = [f"{k:09d}.{suffix}" for k in range(300) for suffix in ("jpg", "json", "txt")]
    shard = reader.open_shard(tar_of(tmp_path / "x.tar", names))
    tables = sum(table.nbytes for table in shard.members.values())
    assert (tables + len(shard.key_bytes) + shard.key_ends.nbytes) / len(shard) == 3 * 8 + 9 + 4
    assert all(table.dtype == np.uint32 for table in shard.members.values())
