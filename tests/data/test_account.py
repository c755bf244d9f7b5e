"""One pass, mixtures, the account of faults, and JPEG decoded no larger than a crop needs."""

import dataclasses
import io
import itertools
import json
import struct
import tarfile
import zlib
from collections import Counter

import data_cases
import numpy as np
import pytest
from data_cases import encode, make_image, train_loader
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_jax.data.augment import jpeg_scale, make_decode, make_transform, smallest_crop
from clip_jax.data.dataset import open_sources, steps_per_epoch
from clip_jax.data.images import crop_box, decode_image
from clip_jax.data.order import (
    MIXTURE_BLOCK,
    BatchOrder,
    BatchPart,
    Mixture,
    Order,
    places_per_block,
)
from clip_jax.data.skip_log import MIN_ROWS, SkipLog
from clip_jax.data.sources import open_shards
from clip_jax.errors import UserError
from clip_jax.sections import DataSection
from clip_jax.training.skip_limit import SkipLimit

CROPS = DataSection()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.sampled_from([8, 16, 24]))
def test_one_pass_gives_every_sample_once_on_any_number_of_hosts(sizes, batch_size):
    if sum(sizes) < 8:
        return
    order = Order(sizes, seed=3, num_streams=8, window=2)
    lengths = [order.stream_length(s) for s in range(8)]
    steps = steps_per_epoch(sum(sizes), batch_size, 8)
    whole = None
    for hosts in (1, 2, 4, 8):
        parts = [
            BatchOrder(
                order,
                batch_size=batch_size,
                part=BatchPart(h, hosts),
                lengths=lengths,
            )
            for h in range(hosts)
        ]
        assert all(part.num_steps == steps for part in parts)
        ids = np.array(
            [
                np.concatenate([part.rows_at(step, 0, part.rows)[0] for part in parts])
                for step in range(steps)
            ]
        )
        assert sorted(ids[ids >= 0].tolist()) == list(range(sum(sizes)))
        whole = ids if whole is None else whole
        np.testing.assert_array_equal(ids, whole)


def mixture(seed=7):
    orders = [Order([n], seed=seed, num_streams=4, window=8) for n in (40, 4000)]
    return Mixture(orders, (3.0, 1.0), seed=seed)


def test_a_mixture_keeps_the_shares_and_each_sources_own_epochs():
    ids, epochs = mixture().samples_at(1, 0, 4 * MIXTURE_BLOCK)
    small = ids < 40
    for block in small.reshape(4, MIXTURE_BLOCK):
        assert block.sum() == 3 * MIXTURE_BLOCK // 4
    # Stream 1 owns 10 of the small source's samples: an epoch of it is 10 places.
    first = ids[small][:10]
    assert sorted(first) == list(range(10, 20)) and (epochs[small][:10] == 0).all()
    assert epochs[small].max() == 3 * MIXTURE_BLOCK // 10 - (3 * MIXTURE_BLOCK % 10 == 0)
    large = ids[~small]
    assert (
        len(large) == MIXTURE_BLOCK and len(set(large[:1000])) == 1000
    )  # 1,000 of its own a stream
    assert ((large >= 40 + 1000) & (large < 40 + 2000)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5 * MIXTURE_BLOCK), st.integers(1, 2 * MIXTURE_BLOCK))
def test_any_position_of_a_mixture_can_be_the_first(position, count):
    whole = mixture().samples_at(2, 0, position + count)
    part = mixture().samples_at(2, position, count)
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a[position:], b)


def test_places_of_weights():
    assert places_per_block((1.0, 1.0, 1.0)) == [342, 341, 341]
    for weights in ((0.0, 1.0), (-1.0, 2.0), (float("inf"), 1.0), (1e-9, 1.0)):
        with pytest.raises(UserError, match=r"config\.data\.weights"):
            places_per_block(weights)


def test_a_mixture_through_the_loader(tmp_path):
    sources = open_sources(
        [
            str(path)
            for name, sizes in (("a", [12]), ("b", [8, 8]))
            for path in ["::".join(data_cases.write_shards(tmp_path, sizes, prefix=name))]
        ]
    )
    assert [len(source) for source in sources] == [1, 2]
    with train_loader(*sources, batch_size=64, window=8, threads=0, weights=(3.0, 1.0)) as loader:
        keys = [key for batch in itertools.islice(loader, 64) for key in batch["key"]]
    counts = Counter(key[0] for key in keys)
    assert counts == {"a": 3 * 64 * 64 // 4, "b": 64 * 64 // 4}


def bomb(side):
    """Return a PNG header of side x side pixels with hardly any bytes behind it."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)

    def chunk(kind, body):
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    rows = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + rows + chunk(b"IEND", b"")


JPEG = encode(make_image("RGB", 40, 30), "JPEG")
DAMAGES = {
    "truncated": lambda k: JPEG[: -20 - k % 100],
    "empty": lambda k: b"",
    "not_an_image": lambda k: b"no image" + bytes([k % 256]),
    "too_large": lambda k: bomb(30_000),
}


def damaged_shards(folder, shards, each):
    """Write shards in which one sample in five is of each damage, and one is good."""
    for s in range(shards):
        with tarfile.open(folder / f"d-{s:03d}.tar", "w") as tar:
            for k in range(each):
                kind = [*DAMAGES, "good"][k % 5]
                data = JPEG if kind == "good" else DAMAGES[kind](k)
                for suffix, body in (("jpg", data), ("txt", b"x")):
                    member = tarfile.TarInfo(f"{s:03d}{k:05d}.{suffix}")
                    member.size = len(body)
                    tar.addfile(member, io.BytesIO(body))


def test_a_thousand_damaged_images_are_counted_exactly_and_listed_once(tmp_path):
    damaged_shards(tmp_path, 5, 250)
    log = SkipLog(tmp_path / "run" / "skipped.jsonl", max_fraction=1.0)
    shards = open_shards([str(p) for p in sorted(tmp_path.glob("*.tar"))])
    with train_loader(shards, batch_size=1250, streams=5, window=8, log=log) as loader:
        for epoch in (1, 2):
            assert next(loader)["valid"].sum() == 250
            assert loader.skipped == dict.fromkeys(DAMAGES, 250 * epoch)
    lines = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert len(lines) == len({line["name"] for line in lines}) == 1000
    assert Counter(line["cause"] for line in lines) == dict.fromkeys(DAMAGES, 250)


def test_too_many_skipped_samples_end_the_run_with_the_table(tmp_path):
    damaged_shards(tmp_path, 1, 250)
    shards = open_shards([str(p) for p in tmp_path.glob("*.tar")])
    log = SkipLog(max_fraction=0.5)
    with train_loader(shards, batch_size=250, streams=1, log=log, threads=0) as loader:
        limit = SkipLimit(log, 0, loader)
        for batch in itertools.islice(loader, 2):  # 400 of what counts as 1,000
            limit.check(np.array([[250 - batch["valid"].sum(), 250]]))
        next(loader)
        with pytest.raises(UserError, match=r"600 of 750 samples .*150 truncated") as caught:
            limit.check(np.array([[200, 250]]))
    assert "config.data.max_skip_fraction, now 0.5" in str(caught.value)
    assert MIN_ROWS == 1000


def test_missing_and_damaged_shards_are_left_out_and_named(tmp_path):
    paths = data_cases.write_shards(tmp_path, [4] * 8)
    with open(paths[3], "r+b") as file:
        file.truncate(700)
    with open(paths[5], "wb") as file:
        file.write(b"\x1f\x8b....")
    pattern = f"{tmp_path}/s-{{00000..00009}}.tar"
    log = SkipLog(tmp_path / "skipped.jsonl", max_fraction=0.4)
    (source,) = open_sources(pattern, log=log)
    assert len(source) == 6
    assert log.shard_counts == {"shard_missing": 2, "shard_damaged": 2}
    names = [
        json.loads(line)["name"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()
    ]
    assert sorted(names) == [f"{tmp_path}/s-{k:05d}.tar" for k in (3, 5, 8, 9)]
    with pytest.raises(UserError, match="4 of 10 shards could not be used: 2 shard_"):
        open_sources(pattern, log=SkipLog(max_fraction=0.3))
    with pytest.raises(UserError, match=r"s-00008.tar and 1 more are missing"):
        open_sources(pattern)


@settings(max_examples=200, deadline=None)
@example(15, 5, 1.0, 0.3125, 0)
@given(
    st.integers(1, 900),
    st.integers(1, 900),
    st.floats(0.05, 1.0),
    st.floats(0.3, 1.0),
    st.integers(0, 2**32),
)
def test_no_crop_is_smaller_than_the_smallest(width, height, low, ratio, seed):
    scale, ratios = (low, 1.0), (ratio, 1 / ratio)
    least = smallest_crop(width, height, scale, ratios)
    left, top, right, bottom = crop_box(width, height, np.random.default_rng(seed), scale, ratios)
    # A crop's sides are rounded to whole pixels; before that one that fits by rounding down may be
    # half a pixel larger than the image, and the other side is smaller by as much.
    sides = [
        min(side, low * width * height / (other + 0.5)) - 0.5 - 1e-9
        for side, other in zip(least, (height, width), strict=True)
    ]
    assert right - left >= sides[0] and bottom - top >= sides[1]


def test_a_jpeg_is_decoded_just_large_enough():
    decode = make_decode(100, CROPS)
    for size, k in (((800, 800), 2), ((300, 300), 3), ((120, 120), 8), ((90, 500), 8)):
        assert jpeg_scale(*size, 100, CROPS.crop_scale, CROPS.crop_ratio) == k
        data = encode(make_image("RGB", *size), "JPEG", quality=90)
        image = decode(data)
        assert image.size == tuple(-(-side * k // 8) for side in size)
        whole = decode_image(data)
        if k == 8:
            assert image.tobytes() == whole.tobytes()
    smooth = Image.linear_gradient("L").convert("RGB").resize((640, 480))
    data = encode(smooth, "JPEG", quality=95)
    mean = np.asarray(decode(data)).mean() - np.asarray(decode_image(data)).mean()
    assert abs(mean) < 1.0  # of 255; the same image, only smaller


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpegs_of_other_colors_and_damaged_ones_are_pillows(mode):
    decode = make_decode(16, CROPS)
    data = encode(make_image(mode, 64, 64), "JPEG")
    assert decode(data).tobytes() == decode_image(data).tobytes()
    for broken in (JPEG[:400], b"\xff\xd8\xff\xe0", b"\xff\xd8\xff" + bytes(50)):
        with pytest.raises(Exception) as ours:
            decode(broken)
        with pytest.raises(Exception) as pillows:
            decode_image(broken)
        assert ours.value.cause == pillows.value.cause


def test_mirrored_and_gray_by_chance_without_moving_the_crop():
    image = make_image("RGB", 40, 30)

    def made(seed, **changes):
        transform = make_transform(16, dataclasses.replace(CROPS, **changes))
        return transform(image, np.random.default_rng(seed))

    plain = [made(seed) for seed in range(40)]
    assert all((made(s, flip=1.0) == plain[s][:, ::-1]).all() for s in range(40))
    gray = [made(s, grayscale=0.5) for s in range(40)]
    are_gray = [bool((g == g[..., :1]).all()) for g in gray]
    assert 8 <= sum(are_gray) <= 32  # binomial(40, 1/2) is outside with 1e-4
    for g, p, is_gray in zip(gray, plain, are_gray, strict=True):
        expected = Image.fromarray(p).convert("L")
        np.testing.assert_array_equal(g[..., 0], np.asarray(expected) if is_gray else p[..., 0])
