"""A run says when captions do not fit where they are to be packed: each line, and once in words."""

import pytest

from clip_jax.data.caption_packing import CaptionPacking
from clip_jax.training.unpacked_steps import UnpackedSteps

PACKING = CaptionPacking(256, 50, 128, 18.0)


def reports(unpacked, *, every):
    """Return what is reported every so many steps, of which those of these numbers did not fit."""
    steps, results = UnpackedSteps(PACKING, 77), []
    for step in range(300):
        steps.count(77 if step in unpacked else PACKING)
        if (step + 1) % every == 0:
            results.append(steps.report())
    return results


def test_shares_are_those_since_the_line_before():
    shares = [share for share, _ in reports({0, 150, 199}, every=100)]
    assert shares == [0.01, 0.02, 0.0]


@pytest.mark.parametrize("every", [1, 10, 100, 300])
def test_many_are_told_once_with_what_to_set(every):
    lines = [line for _, line in reports(set(range(0, 300, 10)), every=every) if line]
    assert len(lines) == 1 and "\n" not in lines[0]
    assert " steps did not fit into 50 segments of 128 tokens a device" in lines[0]
    assert "took all 77 tokens" in lines[0] and "set config.data.caption_packing to" in lines[0]


@pytest.mark.parametrize("every", [1, 10, 100, 300])
@pytest.mark.parametrize("unpacked", [set(), {0, 1}, {50, 150, 250}])
def test_chance_is_not_told(unpacked, every):
    assert not any(line for _, line in reports(unpacked, every=every))


def test_many_are_told_after_a_long_time_of_none():
    assert any(line for _, line in reports({290, 292, 294}, every=10))
