"""How `benchmarks.fits` finds the fewest devices; its page, and the experiments' docstrings."""

import re
from pathlib import Path

import pytest

from benchmarks.fits import (
    COLUMNS,
    EXPERIMENTS,
    TABLE,
    cell,
    in_parts,
    page,
    read_figures,
    sentence,
    smallest,
)

FITS = {"fits": True, "estimated_seconds": 0.5, "steps": 172_800, "exposed_seconds": 0.25}


@pytest.mark.parametrize("start", [1, 4, 16, 64])
@pytest.mark.parametrize(("needed", "fewest"), [(0.2, 1), (7.1, 8), (8.0, 16), (50.0, 64)])
def test_the_search_ends_at_the_fewest_devices(needed, fewest, start):
    """Of `needed` memories in all; a compiler takes 0.95 of one."""
    asked = []

    def compile_on(count):
        asked.append(count)
        fits = needed / count <= 0.95
        values = FITS if fits else dict.fromkeys(("estimated_seconds", "steps"))
        return values | {"fits": fits, "memory_bytes": 1e9 * needed / count}

    found = smallest(compile_on, [1, 2, 4, 8, 16, 32, 64], 1e9, start)
    assert found["fits"] and found["devices"] == fewest and len(asked) <= 3
    assert cell(found) == f"{fewest}: 1.5 days"


def test_a_program_that_never_fits_and_one_that_fails():
    found = smallest(lambda n: {"fits": False, "memory_bytes": 1e12}, [1, 2, 4], 1e9, 1)
    assert cell(found) == "more than 4"
    assert cell(smallest(lambda n: {"failed": "no"}, [1, 2], 1e9, 1)) == "failed"


@pytest.mark.parametrize(
    ("memories", "fixed", "parts"), [(1.5, 0.1, 2), (1.95, 0.2, 4), (5.0, 0.0, 8), (9.0, 0.0, 0)]
)
def test_a_batch_that_fits_on_none_is_taken_in_the_fewest_micro_batches(memories, fixed, parts):
    """Of `memories` of a device, `fixed` are the same however many micro-batches there are."""
    asked = []

    def compile_in(count):
        asked.append(count)
        needed = fixed + (memories - fixed) / count
        return FITS | {"fits": needed <= 0.95, "memory_bytes": 1e9 * needed}

    whole = {"fits": False, "memory_bytes": 1e9 * memories, "devices": 256}
    found = in_parts(compile_in, whole, 1e9)
    assert (found.get("parts", 0), found["fits"]) == (parts, parts > 0) and len(asked) <= 2
    assert cell(found) == (f"256: 1.5 days in {parts} micro-batches" if parts else "more than 256")


def test_docstrings_have_the_figures_of_the_page():
    figures = read_figures()
    text = TABLE.read_text(encoding="utf-8")
    assert text == page(figures) + "\n", "write it anew: python -m benchmarks.fits --page"
    for name, columns in figures.items():
        words = Path(f"experiments/{name}.py").read_text(encoding="utf-8").split('"""')[1]
        assert sentence(columns) in re.sub(r"\s+", " ", words), name
        assert f"| `{name}` | {EXPERIMENTS[name][0]:,} | " in text
        assert columns.keys() <= set(COLUMNS)
