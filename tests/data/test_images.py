"""Decoding refuses what it must, and the transforms are torchvision's (by golden digests)."""

import contextlib
import json
import struct
import threading
import warnings
import zlib
from pathlib import Path

import data_cases
import numpy as np
import pytest
from data_cases import encode, make_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from clip_jax.data import images
from clip_jax.data.augment import make_decode
from clip_jax.data.images import (
    IMAGE_MEAN,
    IMAGE_STD,
    ImageError,
    Preprocess,
    count_scans,
    crop_box,
    decode_image,
    eval_transform,
    random_resized_crop,
)
from clip_jax.sections import DataSection


def cause(data, **options):
    with pytest.raises(ImageError) as caught:
        decode_image(data, **options)
    return caught.value.cause


@pytest.mark.parametrize("case", sorted(data_cases.GOLDEN))
def test_eval_transform_equals_torchvisions_recorded_output(case):
    """tests/parity/test_images_parity.py holds torchvision itself to the same digests."""
    mode, size, n = case
    assert data_cases.digest(eval_transform(make_image(mode, *size), n)) == data_cases.GOLDEN[case]


def test_every_mode_equals_open_clips_recorded_output():
    """tests/parity/test_images_parity.py makes them, and holds open_clip itself to them."""
    golden = json.loads((Path(__file__).parents[1] / "golden" / "preprocess.json").read_text())
    assert len(golden) == 120
    for mode, width, height, n, resize_mode, interpolation, fill, digest in golden:
        preprocess = Preprocess(resize_mode, interpolation, fill=fill)
        out = eval_transform(make_image(mode, width, height), n, preprocess)
        assert data_cases.digest(out) == digest, (mode, width, height, n, preprocess)


RESIZE_MODES = st.sampled_from(["shortest", "longest", "squash"])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 64), RESIZE_MODES)
def test_eval_transform_always_fills_its_square(width, height, n, resize_mode):
    preprocess = Preprocess(resize_mode, "bilinear")
    out = eval_transform(make_image("L", width, height), n, preprocess)
    assert out.shape == (n, n, 3) and out.dtype == np.uint8


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.integers(1, 64))
def test_a_square_is_the_same_in_every_mode(side, n):
    """There is nothing to crop, pad or distort."""
    image = make_image("RGB", side, side)
    modes = ("shortest", "longest", "squash")
    shortest, *others = (eval_transform(image, n, Preprocess(mode, fill=9)) for mode in modes)
    for other in others:
        np.testing.assert_array_equal(other, shortest)


def test_padding_has_the_fill_color_and_the_odd_pixel_below():
    out = eval_transform(make_image("L", 40, 19), 40, Preprocess("longest", fill=77))
    assert (out[:10] == 77).all() and (out[29:] == 77).all()
    np.testing.assert_array_equal(out[10:29, :, 0], np.asarray(make_image("L", 40, 19)))


def test_a_thread_thin_image_is_refused_before_squashing_it():
    """Pillow widens first: 100,000 rows of 224 would stand between its two passes."""
    with pytest.raises(ImageError, match="too_large"):
        eval_transform(make_image("L", 1, 100_000), 224, Preprocess("squash"), max_pixels=10**7)
    assert eval_transform(make_image("L", 100_000, 1), 24, Preprocess("squash")).shape == (
        24,
        24,
        3,
    )


def test_a_thread_thin_image_is_refused_before_it_grows():
    with pytest.raises(ImageError, match="too_large"):
        eval_transform(make_image("L", 1, 5000), 224, max_pixels=10**7)


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
def test_decoding_gives_the_pixels_of_the_file(fmt):
    image = make_image("RGB", 40, 30)
    options = {"lossless": True} if fmt == "WEBP" else {}
    decoded = decode_image(encode(image, fmt, **options))
    assert decoded.mode == "RGB" and decoded.size == (40, 30)
    if fmt != "JPEG":
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image))


def test_exif_does_not_turn_the_image():
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn right"
    assert decode_image(encode(make_image("RGB", 40, 30), "JPEG", exif=exif)).size == (40, 30)


@pytest.mark.parametrize("fmt", ["PPM", "ICO"])
def test_other_formats_are_refused(fmt):
    assert cause(encode(make_image("RGB", 16, 16), fmt)) == "not_an_image"


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF0000WEBP", b"<"]
)
def test_stubs_are_refused(data):
    assert cause(data) in {"empty", "truncated", "broken", "not_an_image"}


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
def test_a_cut_file_is_never_an_image(fmt):
    data = encode(make_image("RGB", 40, 30), fmt)
    last = len(data) - 12  # behind it are no pixels: PNG's end chunk, JPEG's end mark
    causes = [cause(data[:n]) for n in range(0, last, 7)]
    assert causes.count("truncated") > len(causes) / 2
    assert set(causes) <= {"truncated", "broken", "not_an_image", "empty"}


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.data())
def test_no_bytes_raise_anything_but_image_error(fmt, data):
    raw = bytearray(encode(make_image("RGB", 16, 16), fmt))
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ImageError):
        decode_image(bytes(raw), max_pixels=10**6)


@pytest.mark.parametrize("error", [TypeError, AttributeError, SyntaxError, struct.error])
def test_whatever_pillow_raises_is_the_images_fault(monkeypatch, error):
    """What its readers raise on damaged chunks depends on their version."""

    def fail(*args):
        raise error("of a chunk")

    data = encode(make_image("RGB", 16, 16), "PNG")
    monkeypatch.setattr(PngImageFile, "load", fail)
    with pytest.raises(ImageError, match=f"broken: {error.__name__.split('.')[-1]}: of a chunk"):
        decode_image(data)
    image = make_image("RGB", 16, 16)
    monkeypatch.setattr(image, "resize", fail)
    with pytest.raises(ImageError, match="of a chunk"):
        eval_transform(image, 8)


@pytest.mark.parametrize("error", [TypeError, AttributeError, NameError])
def test_a_mistake_of_our_own_is_no_image_error(monkeypatch, error):
    def fail(*args):
        raise error("ours")

    monkeypatch.setattr(images, "_webp_size", fail)
    with pytest.raises(error, match="ours"):
        decode_image(encode(make_image("RGB", 16, 16), "WEBP"))
    monkeypatch.setattr(images, "fitted_size", fail)
    with pytest.raises(error, match="ours"):
        eval_transform(make_image("RGB", 16, 16), 8)


def png_header(width, height):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = b"\0\0\0\0IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    crc = struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + crc + end


def test_bombs_are_refused_by_their_header_without_a_warning():
    vp8x = struct.pack("<4sI4s4sI", b"RIFF", 22, b"WEBP", b"VP8X", 10) + bytes(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cause(png_header(11_000, 11_000)) == "too_large"
        assert cause(png_header(60_000, 60_000)) == "too_large"
        assert cause(vp8x + b"\xff\xff\x00\xff\xff\x00" + bytes(8)) == "too_large"
        for fmt in ("JPEG", "PNG", "WEBP"):
            data = encode(make_image("RGB", 40, 30), fmt)
            assert cause(data, max_pixels=40 * 30 - 1) == "too_large"
            assert decode_image(data, max_pixels=40 * 30).size == (40, 30)


def with_scans(side, scans):
    """Return a progressive JPEG whose last scan is there several times more."""
    data = encode(Image.new("RGB", (side, side)), "JPEG", progressive=True, quality=10)
    tables = data.rfind(b"\xff\xc4", 0, data.rfind(b"\xff\xda"))
    return data[:-2] + data[tables:-2] * scans + data[-2:]


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded():
    plain, bomb = with_scans(64, 0), with_scans(64, 100)
    assert count_scans(plain) == 10 and count_scans(bomb) == 110
    assert count_scans(encode(Image.new("RGB", (9, 9)), "PNG")) == 0
    # A small image may have many; the work is bounded.
    assert decode_image(bomb).size == (64, 64)
    train = make_decode(32, DataSection(max_pixels=64 * 64))
    for decode in (lambda data: decode_image(data, max_pixels=64 * 64), train):
        assert 32 <= decode(plain).width <= 64
        with pytest.raises(ImageError, match="too_large: 110 scans of 64 x 64"):
            decode(bomb)


def test_decoding_in_threads_leaves_the_warning_filters_alone():
    before = list(warnings.filters)
    transparent = encode(make_image("P", 20, 20), "PNG", transparency=bytes(range(256)))

    def work():
        for _ in range(50):
            eval_transform(decode_image(transparent), 8)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


def test_crop_keeps_the_sampling_rule():
    """Area and aspect stay inside their bounds (a pixel of rounding), places are uniform."""
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(200, 150, rng, (0.3, 0.6), (0.75, 4 / 3)) for _ in range(3000)])
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    assert (left >= 0).all() and (top >= 0).all() and (right <= 200).all() and (bottom <= 150).all()
    area = width * height / (200 * 150)
    assert area.min() > 0.29 and area.max() < 0.61
    assert (width / height).min() > 0.73 and (width / height).max() < 1.36
    free = width < 190
    place = left[free] / (200 - width[free])
    # The mean of 3,000 uniform draws lies within 0.02 (4 standard errors) of one half.
    assert abs(place.mean() - 0.5) < 0.02


@pytest.mark.parametrize("size, box", [((10, 100), (0, 43, 10, 56)), ((100, 10), (43, 0, 56, 10))])
def test_crop_falls_back_to_the_centre(size, box):
    assert crop_box(*size, np.random.default_rng(0), (0.9, 1.0), (0.75, 4 / 3)) == box


def test_whole_crop_is_a_plain_resize():
    image = make_image("RGB", 30, 30)
    out = random_resized_crop(image, 12, np.random.default_rng(0), (1.0, 1.0), (1.0, 1.0))
    np.testing.assert_array_equal(out, np.asarray(image.resize((12, 12), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("mode", data_cases.MODES)
def test_random_crop_of_every_mode(mode):
    image = make_image(mode, 31, 17)
    first, again = (
        random_resized_crop(image, 12, np.random.default_rng(1), (0.9, 1.0), (3 / 4, 4 / 3))
        for _ in range(2)
    )
    assert first.shape == (12, 12, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)


def test_openais_statistics():
    assert IMAGE_MEAN == (0.48145466, 0.4578275, 0.40821073)
    assert IMAGE_STD == (0.26862954, 0.26130258, 0.27577711)
