"""The memory of a run on CPUs: what one step gives back, the next one takes again.

XLA on a CPU allocates a step's activations anew every time. glibc answers a request of that size
with pages fresh from the kernel and gives them back afterwards, so that every step writes to
gigabytes of pages that have to be found and cleared first.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

# glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
# Linux's mman-common.h, and the size of a huge page on x86-64 and on Arm with pages of 4 KiB.
MADV_HUGEPAGE, HUGE_PAGE = 14, 2**21


def keep_freed_memory() -> bool:
    """Let this process keep what it frees; return whether that could be arranged.

    Call before threads start: memory is kept in one arena, and a thread stays in its own. Where
    glibc is not the C library, or JAX has an accelerator, nothing is done.
    """
    if has_accelerator_plugin() or not keep_heap():
        return False
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    use_huge_pages(ctypes.CDLL(None), half)
    return True


def keep_heap() -> bool:
    """Let malloc keep what is freed, in one heap; return whether the C library is glibc.

    Call before threads start, as for `keep_freed_memory`.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1))
    return all(mallopt(name, value) == 1 for name, value in settings)


def use_huge_pages(libc: ctypes.CDLL, size: int) -> None:
    """Ask for huge pages in the next `size` bytes of the heap, none of which is touched yet.

    What is freed stays in the heap, so a block that is asked for, advised about, and freed at once
    is where the next arrays will lie.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block is None:
        return  # so much is more than the process may have; it does without
    start = -(-block // HUGE_PAGE) * HUGE_PAGE
    libc.madvise(start, (block + size - start) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)
    libc.free(block)


def has_accelerator_plugin() -> bool:
    """Return whether JAX may run on something else than the CPU; no backend is started."""
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None
