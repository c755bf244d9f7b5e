"""Packed captions: each lies whole in a segment, none over another, and there is room for all."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data.caption_packing import (
    COUNTED_LENGTHS,
    CaptionPacking,
    choose_packing,
    format_shares,
    measured_shares,
    pack_captions,
    parse_shares,
    place_captions,
    trimmed_tokens,
)
from clip_jax.errors import UserError

END = 99


def web_lengths(rng, rows, context=77):
    """Draw lengths as on the web: log-normal, median 11 tokens, 3 % at the context's length."""
    sigma = np.log(context / 11) / 1.8808  # the normal distribution's 97th percentile
    return np.clip(np.round(11 * np.exp(sigma * rng.standard_normal(rows))), 2, context).astype(int)


def text_of(lengths, context=77):
    """Make captions of these lengths, every token its own."""
    text = np.zeros((len(lengths), context), np.int32)
    for row, length in enumerate(lengths):
        text[row, :length] = 100 + 1000 * row + np.arange(length)
        text[row, length - 1] = END
    return text


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 8]))
def test_every_caption_lies_whole_in_a_segment(seed, parts):
    rng = np.random.default_rng(seed)
    packing = CaptionPacking(32, 6, 128, 20.0)
    lengths = rng.choice(rng.integers(2, 78, 4), (parts, 32))
    text = text_of(lengths.reshape(-1))
    packed = pack_captions(text, END, packing)
    fits = all(max(place_captions(own, 128)[0]) < 6 for own in lengths)
    assert (packed is not None) == fits
    if packed is None:
        return
    tokens, positions = (packed[f"text_{n}"].reshape(parts, -1) for n in ("tokens", "positions"))
    assert packed["text_tokens"].shape == packed["text_positions"].shape == (parts * 6, 128)
    end = packed["text_end"].reshape(parts, 32)
    for part, row in np.ndindex(parts, 32):
        last, length = end[part, row], lengths[part, row]
        own = slice(last - length + 1, last + 1)
        assert own.start // 128 == last // 128
        np.testing.assert_array_equal(tokens[part, own], text[part * 32 + row, :length])
        np.testing.assert_array_equal(positions[part, own], np.arange(length))
    # None lies over another, and empty rows are zeros.
    assert (tokens != 0).sum() == lengths.sum()
    assert not positions[tokens == 0].any()


def test_a_caption_without_an_end_is_read_at_its_first_token():
    text = text_of([5, 9])
    text[1] = np.arange(77) + 200
    packed = pack_captions(text, END, CaptionPacking(2, 1, 128, 7.0))
    assert packed["text_tokens"][0, packed["text_end"][1]] == 200
    assert (packed["text_tokens"] != 0).sum() == 6


@pytest.mark.parametrize("captions", [64, 256, 1024])
def test_rows_of_captions_as_on_the_web(captions):
    rng = np.random.default_rng(0)
    counted = np.bincount(web_lengths(rng, 4096), minlength=78)
    shares = measured_shares(counted, 77)
    assert list(shares) == [n for n in COUNTED_LENGTHS if n < 77]
    assert parse_shares(format_shares(shares)) == shares
    packing = choose_packing(shares, captions, 77)
    assert packing == choose_packing(shares, captions, 77)
    assert packing.segments % 2 == 0 and 17 < packing.mean_length < 19
    assert packing.rows_per_caption <= {64: 32, 256: 25, 1024: 21}[captions]
    # A batch of 32,768 always has one of 77 tokens.
    assert trimmed_tokens(shares, 32_768, 77) > 76.99
    for _ in range(200):
        assert max(place_captions(web_lengths(rng, captions), 128)[0]) < packing.segments


def test_room_is_kept_for_captions_that_were_not_counted():
    packing = choose_packing({16: 1.0}, 256, 77)
    assert (packing.segments, packing.segment_rows) == (36, 128)
    assert str(packing) == "36 segments of 128 tokens" and packing.rows_per_caption == 18
    # All long: at most one a segment, which always fits.
    assert choose_packing({16: 0.0}, 256, 77).segments == 256
    assert choose_packing({16: 0.5}, 4, 200).segment_rows == 256


@pytest.mark.parametrize(
    "text, words",
    [
        ("on", "it takes auto, off, or lengths"),
        ("16:0.5,x:1", "it takes auto, off, or lengths"),
        ("16", "it takes auto, off, or lengths"),
        ("32:0.5,16:0.6", "must rise"),
        ("16:0.5,32:0.4", "must rise"),
        ("16:0.5,32:1.5", "in 0..1"),
    ],
)
def test_shares_that_are_none(text, words):
    with pytest.raises(UserError, match=r"config\.data\.caption_packing is .*" + words):
        parse_shares(text)
