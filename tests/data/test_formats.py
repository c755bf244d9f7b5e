"""Every kind of source gives the same pairs; each is written by the library whose format it is."""

import os
from collections import Counter

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import eval_loader, train_loader
from format_cases import (
    CAPTIONS,
    COUNT,
    FORMATS,
    IMAGES,
    NO_LABEL,
    example,
    write_images,
    write_parquet,
    write_tar,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data import filters
from clip_jax.data.captions import captions_of_kind
from clip_jax.data.dataset import LostShard
from clip_jax.data.formats import records, remote
from clip_jax.data.formats.errors import ShardError
from clip_jax.data.shards import BadSampleError, Handles
from clip_jax.data.sources import expand, format_of, open_shard, open_shards
from clip_jax.errors import UserError


def read_all(shards):
    with eval_loader(shards, batch_size=COUNT) as loader:
        batches = list(loader)
        assert not loader.skipped, loader.recent
    return batches


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_pairs(kind, tmp_path):
    shards = open_shards(expand(str(FORMATS[kind](tmp_path))))
    (batch,) = read_all(shards)
    assert batch["valid"].all()
    assert batch["captions"] == [[caption] for caption in CAPTIONS]
    assert batch["label"].tolist() == ([-1] * COUNT if kind in NO_LABEL else list(range(COUNT)))
    (tmp_path / "reference").mkdir()
    (reference,) = read_all(open_shards(expand(str(write_tar(tmp_path / "reference")))))
    np.testing.assert_array_equal(batch["image"], reference["image"])
    np.testing.assert_array_equal(batch["text"], reference["text"])
    with train_loader(shards, batch_size=COUNT, seed=1, streams=2, repeat=False) as loader:
        trained = list(loader)
    keys = Counter(
        key for b in trained for key, valid in zip(b["key"], b["valid"], strict=True) if valid
    )
    assert keys == Counter(batch["key"])


def test_a_parquet_file_is_opened_twice(tmp_path):
    """The images that were spooled for training, say, serve the evaluation."""
    path = str(write_parquet(tmp_path))
    images = [read_all(open_shards([path]))[0]["image"] for _ in range(2)]
    np.testing.assert_array_equal(*images)


def test_a_tfds_set_made_from_a_folder_by_tfds_itself(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    class Pairs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "caption": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["red_fox", "b", "c", "d", "e", "f"]),
            }
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for k in range(COUNT):
                path = tmp_path / f"p{k}.png"
                yield k, {"image": str(path), "caption": CAPTIONS[k], "label": k}

    write_images(tmp_path)
    builder = Pairs(data_dir=str(tmp_path / "tfds"), file_format="array_record")
    builder.download_and_prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    (batch,) = read_all(open_shards(expand("tfds:pairs#split=train")))
    # tfds shuffles when it writes.
    assert sorted(batch["captions"]) == [[caption] for caption in CAPTIONS]
    assert [f"caption {k}, é" for k in batch["label"]] == [c[0] for c in batch["captions"]]
    other = open_shards(expand(builder.data_dir))
    np.testing.assert_array_equal(read_all(other)[0]["image"], batch["image"])
    with pytest.raises(UserError, match="is not prepared in"):
        open_shards(expand("tfds:nothing"))
    with pytest.raises(UserError, match="cannot be read"):
        open_shards(expand("tfds:pairs#split=tset"))
    for role in ("image", "caption", "label"):
        with pytest.raises(UserError, match=f"no feature 'words' for the {role}"):
            open_shards(expand(f"tfds:pairs#{role}=words"))


def test_class_folders_give_labels_and_sentences(tmp_path):
    for k, name in enumerate(["bird", "bird", "polar_bear"]):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{k}.png").write_bytes(IMAGES[k])
    (shard,) = open_shards(expand(f"{tmp_path}#template=a photo of a {{}}.|a {{}}"))
    with Handles() as handles:
        assert [shard.label(i, handles) for i in range(3)] == [0, 0, 1]
        assert shard.captions(2, handles) == ["a photo of a polar bear.", "a polar bear"]
    (tmp_path / "loose.png").write_bytes(IMAGES[0])
    with pytest.raises(UserError, match=r"put loose.txt beside it"):
        open_shards(expand(str(tmp_path)))


def test_columns_by_name_and_relative_to_another_folder(tmp_path):
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images")
    (tmp_path / "t.csv").write_text("where,words\np0.png,hello\n")
    with pytest.raises(UserError, match=r"t.csv#image=COLUMN"):
        open_shards([f"{tmp_path}/t.csv"])
    root = tmp_path / "images"
    (shard,) = open_shards(expand(f"{tmp_path}/t.csv#image=where&caption=words&root={root}"))
    with Handles() as handles:
        assert shard.image(0, handles) == IMAGES[0]
        assert shard.captions(0, handles) == ["hello"]


def test_bad_rows_of_a_table_are_counted_and_the_rest_is_read(tmp_path):
    write_images(tmp_path)
    rows = [b"p0.png,good", b"absent.png,x", b"p1.png,\xff\xfe", b"p2.png,", b",x"]
    (tmp_path / "t.csv").write_bytes(b"filepath,title\n" + b"\n".join(rows) + b"\n")
    with eval_loader(open_shards([f"{tmp_path}/t.csv"]), batch_size=COUNT) as loader:
        assert next(loader)["valid"].tolist() == [True] + [False] * 5
        expected = {"read_failed": 1, "caption_not_utf8": 1, "empty_caption": 1, "no_image": 1}
        assert loader.skipped == expected


def test_a_path_that_is_a_number_is_no_image(tmp_path):
    table = pa.table({"path": [1, 2], "caption": ["a", "b"]})
    pq.write_table(table, tmp_path / "t.parquet")
    with eval_loader(open_shards([f"{tmp_path}/t.parquet"]), batch_size=2) as loader:
        assert not next(loader)["valid"].any()
        assert loader.skipped == {"no_image": 2}


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_a_flipped_bit_in_a_record_is_one_bad_sample_or_an_error(kind, tmp_path):
    path = FORMATS[kind](tmp_path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(25):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        try:
            shards = open_shards([str(path)])
        except UserError:
            continue
        with eval_loader(shards, batch_size=COUNT) as loader:
            batch = next(loader)
        good = [b for b, valid in zip(batch["captions"], batch["valid"], strict=True) if valid]
        # A damage is seen, or (in bytes that say nothing) changes nothing.
        assert all(captions in [[c] for c in CAPTIONS] for captions in good)


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_a_cut_file_of_records_is_refused(kind, tmp_path):
    path = FORMATS[kind](tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardError) as caught:
        open_shards([str(path)])
    assert caught.value.cause == "shard_damaged"


def broken_header(path):
    """Python's `tarfile` ends at such a header without a word."""
    write_tar(path.parent).rename(path)
    data = bytearray(path.read_bytes())
    data[1024 + 148] ^= 1  # the checksum of the second member, since the first is of one block
    path.write_bytes(data)


UNUSABLE = [
    ("x.tar", lambda path: None, "shard_missing"),
    ("x.csv", lambda path: None, "shard_missing"),
    ("x.parquet", lambda path: None, "shard_missing"),
    ("x.tfrecord", lambda path: None, "shard_missing"),
    ("x.tar", lambda path: path.mkdir(), "shard_unreadable"),
    ("x.jsonl", lambda path: path.mkdir(), "shard_unreadable"),
    ("x.parquet", lambda path: path.write_bytes(b"no table"), "shard_unreadable"),
    ("x.array_record", lambda path: path.write_bytes(b"no record"), "shard_damaged"),
    ("x.tar", broken_header, "shard_damaged"),
    ("x.tar", lambda path: path.write_bytes(b"BZh9"), "shard_damaged"),
    ("x.tfrecord", lambda path: path.write_bytes(b"no record"), "shard_damaged"),
    ("x.csv", lambda path: path.write_bytes(b"a,b\n1,2\n"), "shard_damaged"),
]


@pytest.mark.parametrize(("name", "make", "cause"), UNUSABLE)
def test_the_cause_of_a_shard_that_cannot_be_opened_is_a_field(name, make, cause, tmp_path):
    make(tmp_path / name)
    with pytest.raises(ShardError, match=name) as caught:
        open_shard(str(tmp_path / name))
    assert caught.value.cause == cause


def test_a_damaged_side_file_is_the_shards_damage(tmp_path):
    path = write_tar(tmp_path)
    for text in ("[1]", "{", "{}"):
        (tmp_path / "0.tar.index.json").write_text(text)
        with pytest.raises(ShardError, match="is damaged") as caught:
            open_shard(str(path))
        assert caught.value.cause == "shard_damaged"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_a_strange_record_is_never_another_error(data):
    try:
        records.parse_example(data)
    except BadSampleError as e:
        assert e.cause == "broken_record"


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a\x02\x08\x05",  # a number for the map entry
        b"\x0a\x04\x0a\x02\x08\x05",  # for the name
        b"\x0a\x04\x0a\x02\x10\x05",  # for the feature
        b"\x0a\x06\x0a\x04\x12\x02\x08\x05",  # for the list
        b"\x0a\x08\x0a\x06\x12\x04\x0a\x02\x08\x05",  # for a value of bytes
    ],
)
def test_a_number_in_the_place_of_bytes_is_a_broken_record(data):
    with pytest.raises(BadSampleError, match="a number in the place of bytes"):
        records.parse_example(data)


def test_examples_hold_bytes_floats_and_signed_integers():
    data = example({"a": b"x", "b": 0.5, "c": -3})
    assert records.parse_example(data) == {"a": [b"x"], "b": [0.5], "c": [-3]}
    # The checksum of TFRecord: CRC32C of "123456789" is 0xE3069283 (RFC 3720, B.4), masked.
    rotated = (0xE3069283 >> 15 | 0xE3069283 << 17) & 0xFFFFFFFF
    assert records.masked_crc(b"123456789") == (rotated + 0xA282EAD8) & 0xFFFFFFFF


@pytest.fixture
def memory(monkeypatch):
    """Return fsspec's file system in memory; there are no pauses between tries."""
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    remote.CACHE.close()
    fs.store.clear()


@pytest.mark.parametrize("kind", ["tar", "csv", "parquet", "tfrecord", "array_record"])
def test_remote_files_are_read_as_local_ones(kind, tmp_path, memory):
    path = FORMATS[kind](tmp_path)
    memory.put(str(tmp_path) + "/", "/bucket/", recursive=True)
    (batch,) = read_all(open_shards(expand(f"memory://bucket/{path.name}")))
    assert batch["captions"] == [[caption] for caption in CAPTIONS]


def test_a_remote_read_is_tried_again_and_then_the_shard_passed_over(tmp_path, memory, monkeypatch):
    write_tar(tmp_path)
    memory.put(str(tmp_path / "0.tar"), "/bucket/0.tar")
    calls = []
    plain_open = type(memory)._open

    def failing(self, path, *args, **kwargs):
        calls.append(path)
        if len(calls) <= broken:
            raise ConnectionError("try later")
        return plain_open(self, path, *args, **kwargs)

    monkeypatch.setattr(type(memory), "_open", failing)
    broken = 2
    shards = open_shards(expand("memory://bucket/{0..0}.tar"))
    assert len(calls) == 3
    remote.CACHE.close()
    calls.clear()
    broken = 100
    with eval_loader(shards, batch_size=COUNT) as loader:
        assert not next(loader)["valid"].any()
        assert loader.skipped == {"shard_unreadable": COUNT}
        assert (
            f"failed {remote.TRIES} times" in loader.recent[-1] and "try later" in loader.recent[-1]
        )
    assert len(calls) == remote.TRIES  # its other samples were passed over at once
    # A lost shard is what is the matter, whichever captions are asked of it.
    lost = LostShard("0.tar", 1, 2, BadSampleError("read_failed", "gone"))
    with Handles() as handles, pytest.raises(BadSampleError) as caught:
        captions_of_kind(lost, ".txt", 0, handles)
    assert caught.value.cause == "read_failed"


def test_a_remote_file_of_which_a_part_came_is_not_used(tmp_path, memory, monkeypatch):
    size = os.path.getsize(write_tar(tmp_path))
    memory.put(str(tmp_path / "0.tar"), "/bucket/0.tar")
    monkeypatch.setattr(type(memory), "info", lambda self, path: {"size": size + 1, "type": "file"})
    with pytest.raises(ShardError, match=f"{size} of {size + 1} bytes came") as caught:
        open_shard("memory://bucket/0.tar")
    assert caught.value.cause == "shard_unreadable"


def test_the_cache_on_disk_is_bounded_and_what_is_open_stays_readable(tmp_path):
    cache = remote.DiskCache(limit=250, parent=str(tmp_path))

    def write(path):
        with open(path, "wb") as file:
            file.write(b"x" * 100)

    fds = [cache.open(f"{k}", write) for k in range(4)]
    (folder,) = tmp_path.iterdir()
    assert sum(f.stat().st_size for f in folder.iterdir()) == 200
    assert all(os.pread(fd, 200, 0) == b"x" * 100 for fd in fds)
    for fd in fds:
        os.close(fd)
    cache.close()
    assert not list(tmp_path.iterdir())


def test_filters_and_repeated_keys(tmp_path):
    (shard,) = open_shards([str(write_tar(tmp_path))])
    kept = filters.filter_shard(shard, filters.parse_filter("width>=200, width!=300"))
    assert [kept.key(i) for i in range(len(kept))] == ["000000002", "000000004", "000000005"]
    assert len(filters.filter_shard(shard, filters.parse_filter("caption==other"))) == COUNT
    assert len(filters.filter_shard(shard, filters.parse_filter("absent>0"))) == 0
    first, second = filters.drop_repeated_keys([kept, shard])
    assert len(first) == 3
    assert [second.key(i) for i in range(3)] == ["000000000", "000000001", "000000003"]
    for text in ("width", "width>x", ">3"):
        with pytest.raises(UserError, match=r"config\.data\.filter"):
            filters.parse_filter(text)


def test_names_that_are_no_data(tmp_path):
    for name in ("x.txt", "a.tar.gz", "a.tgz"):
        with pytest.raises(UserError):
            format_of(name)
