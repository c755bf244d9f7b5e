"""Groups of captions: every caption fits its group, every row comes back, sizes fit the shares."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data.caption_groups import (
    GROUP_LENGTHS,
    CaptionGroups,
    choose_groups,
    format_shares,
    group_captions,
    measured_shares,
    parse_shares,
    trimmed_tokens,
)
from clip_jax.data.loader import caption_lengths
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
def test_every_row_comes_back_from_a_group_that_holds_it(seed, parts):
    rng = np.random.default_rng(seed)
    groups = CaptionGroups((8, 16, 77), (24, 20, 20))
    lengths = rng.integers(2, 9, parts * 64)
    lengths.reshape(parts, 64)[:, rng.permutation(64)[:30]] = rng.integers(2, 78, (parts, 30))
    text = text_of(lengths)
    grouped = group_captions(text, caption_lengths(text, END), groups)
    per_part = lengths.reshape(parts, 64)
    fits = ((per_part > 8).sum(1) <= 40).all() and ((per_part > 16).sum(1) <= 20).all()
    assert (grouped is not None) == fits
    if grouped is None:
        return
    assert [grouped[f"text_{k}"].shape for k in range(3)] == [
        (parts * n, length) for n, length in zip(groups.rows, groups.lengths, strict=True)
    ]
    place = grouped["text_place"].reshape(parts, 64)
    for part in range(parts):
        rows = [
            np.pad(row, (0, 77 - length))
            for k, (n, length) in enumerate(zip(groups.rows, groups.lengths, strict=True))
            for row in grouped[f"text_{k}"][part * n : (part + 1) * n]
        ]
        np.testing.assert_array_equal(
            np.stack(rows)[place[part]], text.reshape(parts, 64, 77)[part]
        )


@pytest.mark.parametrize("rows", [64, 256, 1024])
def test_groups_of_captions_as_on_the_web(rows):
    rng = np.random.default_rng(0)
    counted = np.bincount(web_lengths(rng, 4096), minlength=78)
    shares = measured_shares(counted, 77)
    assert list(shares) == list(GROUP_LENGTHS) and parse_shares(format_shares(shares)) == shares
    groups = choose_groups(shares, rows, 77)
    assert groups.all_rows == rows and groups.lengths[-1] == 77 and len(groups.rows) <= 4
    assert all(n % 8 == 0 for n in groups.rows)
    assert groups.tokens < {64: 50, 256: 36, 1024: 31}[rows]
    # A batch of 32,768 always has one of 77 tokens.
    assert trimmed_tokens(shares, 32_768, 77) > 76.99
    text = text_of(web_lengths(rng, rows))
    misses = 0
    for _ in range(200):
        lengths = web_lengths(rng, 8 * rows)
        misses += group_captions(np.tile(text, (8, 1)), lengths, groups) is None
    assert misses == 0


def test_room_is_kept_for_captions_that_were_not_counted():
    groups = choose_groups({16: 1.0}, 256, 77)
    assert groups == CaptionGroups((16, 77), (248, 8))
    assert groups.tokens == (248 * 16 + 8 * 77) / 256
    assert choose_groups({16: 0.0}, 256, 77) == CaptionGroups((77,), (256,))
    assert str(groups) == "248 at 16, 8 at 77"


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
    with pytest.raises(UserError, match=r"config\.data\.caption_groups is .*" + words):
        parse_shares(text)
