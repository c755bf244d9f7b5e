"""Any source becomes tar shards: nothing changes on the way, and a kill changes nothing either."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from data_cases import encode, eval_loader, make_image
from format_cases import CAPTIONS, COUNT, FORMATS, IMAGES, NO_LABEL
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_iterator

from clip_jax.data.formats.webdataset import split_name
from clip_jax.data.images import decode_image
from clip_jax.data.sample_reader import SampleShape
from clip_jax.data.shards import Handles
from clip_jax.data.sources import expand, open_shards
from clip_jax.data.writing import shard_set
from clip_jax.data.writing.tar_writer import Sample, Shrink, safe_key, write_shard
from clip_jax.errors import UserError
from clip_jax.tools.data_shard import result_text, shard

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_source_keeps_its_images_captions_and_labels(kind, tmp_path):
    (tmp_path / "in").mkdir()
    source = str(FORMATS[kind](tmp_path / "in"))
    written = shard([source], tmp_path / "out", per_shard=4, threads=2).written
    assert (written.samples, written.shards, written.skipped) == (COUNT, 2, {})
    assert written.size == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.tar"))
    shards = open_shards(expand(written.pattern))
    assert [len(one) for one in shards] == [4, 2]
    places = [(one, i) for one in shards for i in range(len(one))]
    with Handles() as handles:
        assert [one.image(i, handles) for one, i in places] == IMAGES
        assert [one.captions(i, handles) for one, i in places] == [[c] for c in CAPTIONS]
        labels = [one.label(i, handles) for one, i in places]
    assert labels == ([-1] * COUNT if kind in NO_LABEL else list(range(COUNT)))


def test_webdataset_reads_what_is_written_and_fields_come_along(tmp_path):
    (tmp_path / "in").mkdir()
    shard([str(FORMATS["csv"](tmp_path / "in"))], tmp_path / "out", where="width>=200")
    # Its own reader; `WebDataset` around it would leave the file to the garbage collector.
    with open(tmp_path / "out" / "00000.tar", "rb") as file:
        members = [m | {"__url__": ""} for m in tar_file_iterator(file)]
    samples = list(group_by_keys(members))
    assert [s["__key__"] for s in samples] == ["p2", "p3", "p4", "p5"]
    assert [s["txt"].decode() for s in samples] == CAPTIONS[2:]
    assert [json.loads(s["json"])["width"] for s in samples] == ["200", "300", "400", "500"]


def damaged_set(folder: Path) -> str:
    """40 samples, every fifth of which cannot be used."""
    with webdataset.TarWriter(str(folder / "in.tar")) as writer:
        for k in range(40):
            data = encode(make_image("RGB", 30, 24, seed=k), "JPEG")
            sample = {"__key__": f"{k:04d}", "jpg": data, "txt": f"caption {k}"}
            if k % 10 == 0:
                sample["jpg"] = b"no image"
            if k % 10 == 5:
                sample["txt"] = " "
            writer.write(sample)
    return str(folder / "in.tar")


def test_unusable_samples_are_left_out_counted_and_named(tmp_path):
    result = shard([damaged_set(tmp_path)], tmp_path / "out", per_shard=10)
    assert result.written.skipped == {"empty_caption": 4, "not_an_image": 4}
    text = result_text(result)
    assert text.startswith("32 pairs in 4 shards")
    assert "left out: 4 empty_caption, 4 not_an_image" in text
    lines = (tmp_path / "out" / "00001.skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["in.tar/0010", "in.tar/0015"]


def test_interrupted_anywhere_and_run_again_it_gives_the_same_bytes(tmp_path, monkeypatch):
    source = damaged_set(tmp_path)
    result = shard([source], tmp_path / "whole", per_shard=6, resize=20, threads=1)
    whole = contents(tmp_path / "whole")
    read, countdown = shard_set.read_sample, [0]

    def failing(*args):
        countdown[0] -= 1
        if countdown[0] == 0:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(shard_set, "read_sample", failing)
    for stop in range(1, 41, 7):
        out = tmp_path / str(stop)
        countdown[0] = stop
        with pytest.raises(KeyboardInterrupt):
            shard([source], out, per_shard=6, resize=20, threads=1)
        assert not set(contents(out)) >= set(whole)
        countdown[0] = 0
        again = shard([source], out, per_shard=6, resize=20, threads=3)
        assert contents(out) == whole
        pattern = result.written.pattern.replace("/whole/", f"/{stop}/")
        assert again.written == dataclasses.replace(result.written, pattern=pattern)


def test_killed_in_the_middle_it_goes_on(tmp_path):
    """The process itself dies, with what that leaves on the disk."""
    with webdataset.TarWriter(str(tmp_path / "in.tar")) as writer:
        for k in range(60):
            data = np.random.default_rng(k).integers(0, 256, (300, 300, 3), np.uint8)
            sample = {"__key__": f"{k:04d}", "jpg": encode(Image.fromarray(data), "JPEG")}
            writer.write(sample | {"txt": f"caption {k}"})
    source, settings = str(tmp_path / "in.tar"), ["--per-shard", "5", "--resize", "200"]
    shard([source], tmp_path / "whole", per_shard=5, resize=200)
    out = tmp_path / "killed"
    line = [sys.executable, "-m", "clip_jax.data.shard", source, "--out", str(out), *settings]
    process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list(out.glob("*.tar")) and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    written = len(list(out.glob("*.tar")))
    assert 0 < written < 12, "the kill came too late to try anything"
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(tmp_path / "whole")


def test_another_request_and_a_folder_of_others_are_left_alone(tmp_path):
    source = damaged_set(tmp_path)
    shard([source], tmp_path / "out", per_shard=10)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"another --per-shard \(10, now 20\)"):
        shard([source], tmp_path / "out", per_shard=20)
    assert contents(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="holds something else"):
        shard([source], tmp_path / "mine")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"per_shard": 0}, "--per-shard is 0"),
        ({"resize": 0}, "--resize is 0"),
        ({"quality": 101}, "--quality is 101; it takes 1 to 100"),
        ({"where": "width>10"}, "no sample meets --filter"),
    ],
)
def test_mistakes_are_one_line(tmp_path, flags, text):
    with pytest.raises(UserError, match=text):
        shard([damaged_set(tmp_path)], tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


FILES = [("JPEG", mode) for mode in ("RGB", "L", "CMYK")]
FILES += [("PNG", mode) for mode in ("RGB", "L", "P", "RGBA", "LA", "1", "I;16")]
FILES += [("WEBP", mode) for mode in ("RGB", "RGBA")]


@pytest.mark.parametrize(("fmt", "mode"), FILES)
def test_resizing_makes_large_images_small_and_leaves_small_ones(fmt, mode):
    data = encode(make_image(mode, 60, 91), fmt)
    assert Shrink(60)(data) is data
    whole, small = decode_image(data), decode_image(Shrink(30)(data))
    if mode in ("P", "1"):
        whole = whole.convert("RGB")
    expected = np.asarray(whole.resize((30, 46)), np.float64)
    found = np.asarray(small, np.float64)
    assert small.mode == whole.mode
    if fmt == "PNG":
        np.testing.assert_array_equal(found, expected)
    else:  # at quality 95 a lossy file keeps a block's mean to 2 steps or less
        np.testing.assert_allclose(found.mean((0, 1)), expected.mean((0, 1)), atol=2.0)


@given(st.lists(st.text(max_size=8), min_size=1, max_size=12))
def test_any_keys_become_names_that_come_back_once_each(keys):
    for key in map(safe_key, keys):
        assert split_name(key + ".jpg") == (key, "jpg")
        assert not key.startswith("/") and ".." not in key.split("/")


def test_equal_keys_are_numbered(tmp_path):
    data = IMAGES[0]
    keys = ["a", "a-2", "a", "a.png", "a", "../../b", "a-2"]
    write_shard(tmp_path / "x.tar", [Sample(key, data, ["c"], {}, -1) for key in keys])
    with tarfile.open(tmp_path / "x.tar") as tar:
        names = [name.removesuffix(".png") for name in tar.getnames() if name.endswith(".png")]
    assert names == ["a", "a-2", "a-3", "a-4", "a-5", "b", "a-2-2"]


def test_written_shards_give_the_batches_of_their_source(tmp_path):
    source = damaged_set(tmp_path)
    shard([source], tmp_path / "out", per_shard=10)
    shape = SampleShape(image_size=16, context_length=24)
    batches = []
    for pattern in (source, str(tmp_path / "out")):
        with eval_loader(open_shards(expand(pattern)), batch_size=40, shape=shape) as loader:
            batches.append(next(loader))
    good = batches[0]["valid"]
    assert good.sum() == 32 == batches[1]["valid"].sum()
    np.testing.assert_array_equal(batches[0]["image"][good], batches[1]["image"][:32])
    np.testing.assert_array_equal(batches[0]["text"][good], batches[1]["text"][:32])
