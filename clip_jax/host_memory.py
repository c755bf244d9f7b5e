"""The memory of a CPU run: what one step gives back, the next one takes again.

XLA on a CPU allocates a step's activations anew every time. glibc answers a request of that size
with pages fresh from the kernel and gives them back afterwards, so that every step writes to
gigabytes of pages that have to be found and cleared first.
"""

import ctypes
import importlib.metadata
import importlib.util
import sys

# glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for itself; whether that could be arranged.

    Call before threads start: memory is kept in one arena, and a thread stays in its own. Where
    glibc is not the C library, or JAX has an accelerator, nothing is done.
    """
    if not sys.platform.startswith("linux") or has_accelerator_plugin():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1))
    return all(mallopt(name, value) == 1 for name, value in settings)


def has_accelerator_plugin() -> bool:
    """Whether JAX may run on something other than the CPU; starts no backend to find out."""
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None
