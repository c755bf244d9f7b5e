"""Memory that the images of the batches are decoded into, in place, and that is used again."""

import mmap
import os
import tempfile
import threading
import weakref
from collections import deque

import numpy as np
from jaxtyping import UInt8


class BatchBuffers:
    """A buffer for each batch that is being read: the first thread that reads of it makes it.

    A buffer returns to the pool when no array lies in it any more, a view or an array of JAX's that
    shares its memory among them, so a batch may be held for as long as one likes.

    Args:
      shape: of a batch's images, uint8.
      shared: keep the buffers in a file in memory, without a name, that other processes can map.

    Attributes:
      shape: see above.
      fd: of that file; -1 without one.
      stride: bytes from one buffer to the next in it.
    """

    def __init__(self, shape: tuple[int, ...], *, shared: bool = False):
        self.shape = shape
        page = mmap.ALLOCATIONGRANULARITY
        self.stride = max(1, -(-int(np.prod(shape)) // page)) * page
        self.fd = memory_file() if shared else -1
        self._count = 0
        self._free: deque[tuple[int, mmap.mmap]] = deque()
        self._lock = threading.Lock()
        self._of_step: dict[int, tuple[int, UInt8[np.ndarray, "b H W 3"]]] = {}

    def of_step(self, step: int) -> tuple[int, UInt8[np.ndarray, "b H W 3"]]:
        """Return the number of a batch's buffer, and the buffer."""
        with self._lock:
            if step not in self._of_step:
                number, memory = self._free.popleft() if self._free else self._make()
                flat = np.frombuffer(memory, np.uint8, int(np.prod(self.shape)))
                # Every view has `flat` as its base, so it lives as long as the last of them.
                returns = weakref.finalize(flat, self._free.append, (number, memory))
                returns.atexit = False
                self._of_step[step] = number, flat.reshape(self.shape)
            return self._of_step[step]

    def take(self, step: int) -> UInt8[np.ndarray, "b H W 3"]:
        """Return the buffer of a batch of which all is read, and forget it."""
        with self._lock:
            return self._of_step.pop(step)[1]

    def close(self) -> None:
        """Close the file; batches that somebody holds stay."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _make(self) -> tuple[int, mmap.mmap]:
        number, self._count = self._count, self._count + 1
        if self.fd < 0:
            return number, mmap.mmap(-1, self.stride)
        os.ftruncate(self.fd, self._count * self.stride)
        return number, mmap.mmap(self.fd, self.stride, offset=number * self.stride)


def memory_file() -> int:
    """Return a descriptor of an empty file that goes when the last process has closed it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("clip_jax-batches")
    with tempfile.TemporaryFile() as file:  # macOS has no files in memory alone
        return os.dup(file.fileno())
