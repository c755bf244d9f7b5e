"""A process keeps the memory that it frees."""

import subprocess
import sys

import pytest

from clip_jax.host_memory import has_accelerator_plugin

# 256 MiB, written to and freed, twice: how many pages the second time had to be found anew.
FAULTS = """
import resource, sys
import numpy as np
from clip_jax.host_memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**25)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, second = faults(), faults()
print(int(kept), first, second)
"""


def run(how: str) -> list[int]:
    out = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True)
    return [int(number) for number in out.stdout.split()]


@pytest.mark.skipif(has_accelerator_plugin(), reason="JAX has an accelerator")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_what_was_freed_is_used_again():
    kept, first, second = run("keep")
    if not kept:
        pytest.skip("the C library has no mallopt")
    # Pages are at least 4 KiB and at most, where the kernel joins them, 2 MiB: 65,536 or 128.
    assert first >= 128 and second < first / 10


def test_nothing_changes_unless_it_is_asked_for():
    assert run("leave")[0] == 0
