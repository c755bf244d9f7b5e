"""Memory that is a process's own: pages of mapped files are not counted, which the system takes
back when it needs them."""

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

POLL_SECONDS = 0.05


def private_bytes() -> int:
    """Return the bytes of memory that are this process's own (RssAnon)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def measure_call(function: Callable[[], object]) -> tuple[float, int]:
    """Return (seconds, peak bytes above the start) of one call, whose result is held to its end."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would be counted as the call's
    start_bytes, peak, finished = private_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not finished.wait(POLL_SECONDS):
            peak = max(peak, private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    peak = max(peak, private_bytes())
    finished.set()
    watcher.join()
    del result
    return seconds, peak - start_bytes
